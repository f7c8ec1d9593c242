"""mohawkify turns a pretrained Transformer into a recurrent model by MOHAWK distillation."""

__version__ = "0.1.0"
