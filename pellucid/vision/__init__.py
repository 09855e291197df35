"""Models for images."""

from .models import mlp, simple_cnn

__all__ = ["mlp", "simple_cnn"]
