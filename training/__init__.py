"""PyTorch: small models, the KAN judge, fitting, distillation, calibration, evaluation, baselines."""
