"""A transformer as the private model of a client: a small ViT, its mean token projected to the width that all share."""

from torch import nn
from transformers import ViTConfig, ViTModel


class PooledViT(nn.Module):
    """Two layers of hidden size 32 on patches of 4 x 4, 24 features."""

    def __init__(self, picture, classes):
        super().__init__()
        channels, *size = picture
        config = ViTConfig(
            image_size=size, num_channels=channels, patch_size=4, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.encoder = ViTModel(config, add_pooling_layer=False)
        self.project = nn.Linear(32, 24)
        self.classifier = nn.Linear(24, classes)

    def features(self, pictures):
        return self.project(self.encoder(pixel_values=pictures).last_hidden_state.mean(1))
