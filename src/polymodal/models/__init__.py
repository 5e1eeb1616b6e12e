"""Neural networks from configs: layers, encoders, connectors, entries, backbones, heads, and what joins them."""
