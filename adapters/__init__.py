"""One file per teacher family, named after transformers' model_type; each holds one ADAPTER."""
