"""What every other package stands on: parts, samples, configs, limits, errors, batches. No torch."""
