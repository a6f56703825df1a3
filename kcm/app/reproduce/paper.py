"""The figures that the paper printed (Dai, Tang, Zhuang 2025, arXiv 2510.20278), in percent."""

from __future__ import annotations

Row = tuple[float, ...]

APD = ("IER", "IED", "Trigger", "Role 1", "Role 2", "Average")
BERT: dict[str, Row] = {
    "large": (88.5, 85.3, 87.2, 81.3, 79.8, 84.42),
    "d": (89.2, 85.9, 87.8, 82.2, 80.5, 85.12),
    "kd": (89.9, 86.2, 88.3, 82.5, 80.9, 85.56),
    "mcm": (90.5, 86.8, 88.8, 83.2, 81.5, 86.16),
    "kcm": (91.1, 87.2, 89.5, 83.9, 82.3, 86.80),
}
CHATGPT: dict[str, Row] = {
    "large": (92.5, 90.3, 91.2, 85.3, 84.8, 88.82),
    "d": (92.9, 90.8, 91.8, 85.9, 85.2, 89.32),
    "kd": (93.3, 91.2, 92.3, 86.3, 85.9, 89.80),
    "mcm": (93.8, 91.8, 92.9, 86.9, 86.5, 90.38),
    "kcm": (94.3, 92.3, 93.5, 87.5, 87.3, 90.98),
}
LONG_TAIL = ("Many", "Medium", "Few", "Overall")
RESNET: dict[str, Row] = {"large": (65.2, 46.1, 20.3, 46.8), "kcm": (70.3, 51.5, 23.8, 52.3)}
BBN: dict[str, Row] = {"large": (73.5, 51.2, 26.5, 53.5), "kcm": (78.4, 56.8, 29.3, 58.7)}
RECALL = ("I2T R@1", "I2T R@5", "I2T R@10", "T2I R@1", "T2I R@5", "T2I R@10")
CLIP: dict[str, Row] = {"large": (73.2, 91.5, 96.8, 54.7, 79.5, 87.2), "kcm": (75.4, 93.1, 97.8, 57.2, 81.6, 89.1)}
ABLATED = ("APD", "CIFAR", "MSCOCO")
ABLATION: dict[str, Row] = {"mcm": (90.38, 57.6, 77.2), "kcm": (90.98, 58.7, 78.2)}
