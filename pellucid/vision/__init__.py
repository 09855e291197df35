"""Models for images."""

from .models import mlp, simple_cnn, small_resnet

__all__ = ["mlp", "simple_cnn", "small_resnet"]
