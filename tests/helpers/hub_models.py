"""Models of transformers with Sinkhorn loops, small and with random weights, as users would wrap them."""

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config, SuperGlueConfig, SuperGlueForKeypointMatching
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

KEYPOINTS, TOKENS, SIZE = 24, 16, 32
DETECTOR = {"model_type": "superpoint", "encoder_hidden_sizes": [8, 8, 8, 8], "decoder_hidden_size": 16}


class Matcher(nn.Module):
    """SuperGlue from keypoints on; its detector finds another number of them in each image."""

    def __init__(self, iterations: int = 20, size: int = SIZE, layers: int = 2) -> None:
        super().__init__()
        config = SuperGlueConfig(
            hidden_size=size,
            keypoint_encoder_sizes=[size // 4, size // 2],
            gnn_layers_types=["self", "cross"] * (layers // 2),
            num_attention_heads=4,
            sinkhorn_iterations=iterations,
            matching_threshold=0.0,
            keypoint_detector_config={**DETECTOR, "descriptor_decoder_dim": size},
        )
        self.glue = SuperGlueForKeypointMatching(config)

    def forward(self, keypoints: Tensor, descriptors: Tensor, scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        matches, matching_scores, *_ = self.glue._match_image_pair(keypoints, descriptors, scores, 240, 320, mask)
        return matches, matching_scores


class Mixer(nn.Module):
    """A block of a language model whose residual streams are mixed by manifold-constrained hyper-connections."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__()
        self.connection, self.mlp = DeepseekV4HyperConnection(DeepseekV4Config(hidden_size=size)), nn.Linear(size, size)
        for weight in self.connection.parameters():
            nn.init.normal_(weight, std=0.3)
        self.head = nn.Linear(size, 5)

    def forward(self, streams: Tensor) -> Tensor:
        post, comb, collapsed = self.connection(streams)
        mixed = post.unsqueeze(-1) * self.mlp(collapsed).unsqueeze(-2) + comb.mT @ streams
        return self.head(mixed.mean((1, 2)))


def matcher_inputs(batch: int, keypoints: int = KEYPOINTS, size: int = SIZE) -> dict[str, Tensor]:
    lengths = torch.randint(keypoints // 3, keypoints, (batch, 2, 1))
    return {
        "keypoints": 240 * torch.rand(batch, 2, keypoints, 2),
        "descriptors": torch.randn(batch, 2, keypoints, size),
        "scores": torch.rand(batch, 2, keypoints),
        "mask": (torch.arange(keypoints) < lengths).long(),
    }


def mixer_inputs(batch: int, tokens: int = TOKENS, size: int = SIZE) -> dict[str, Tensor]:
    return {"streams": torch.randn(batch, tokens, 4, size)}
