"""HuBERT checkpoints (``model_type: hubert``): the encoder of wav2vec 2.0 under other names."""

from __future__ import annotations

from polymodal.models.presets.architecture import Size
from polymodal.models.presets.wav2vec2 import WaveFamily

_MODEL = {"architectures": ["HubertModel"]}
_STABLE = {"conv_bias": True, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
SIZES = {
    "hubert-base-ls960": Size(_MODEL, 94_371_712),
    "hubert-large-ll60k": Size(
        {
            **_MODEL,
            **_STABLE,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
        315_438_720,
    ),
    "hubert-xlarge-ll60k": Size(
        {
            **_MODEL,
            **_STABLE,
            "hidden_size": 1280,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "intermediate_size": 5120,
        },
        962_497_408,
    ),
}
"""Published: 95M, 317M and 964M with the projection and codes of pretraining (arXiv 2106.07447, table I)."""

HUBERT = WaveFamily(
    "hubert",
    "Hubert",
    {"feat_proj_layer_norm": True, "conv_pos_batch_norm": False},
    ("final_proj.{p}", "label_embs_concat"),
).architecture("HuBERT, arXiv 2106.07447, section III", SIZES)
"""See the module."""
