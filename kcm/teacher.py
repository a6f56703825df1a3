"""The teacher store's rows: what the cloud writes and distillation reads.

STORE/inbox-<replica>.db   SQLite, committed before the reply; at least once per (edge_id, sample_id) and replica
STORE/parquet/*.parquet    compacted: exactly once per (edge_id, sample_id), the first commit wins
"""

from __future__ import annotations

# name → Arrow type. Logits are over all labels, in the task's order.
COLUMNS: dict[str, str] = {
    "edge_id": "string",
    "sample_id": "string",
    "received_ms": "int64",  # UTC, of the commit
    "purpose": "int8",  # kcm.sample.Purpose
    "p_escalate": "float",
    "task_id": "string",
    "label_space": "string",
    "bundle_id": "string",
    "text": "string",
    "image": "binary",
    "confidence": "float",  # C_x when it was sent
    "small_logits": "list<halffloat>",  # nullable
    "answer_logits": "list<halffloat>",  # what the reply carried, perhaps under a hint
    "teacher_logits": "list<halffloat>",  # without the hint: the only ones that are distilled; null until filled
    "hint_arm": "int8",  # kcm.sample.HintArm
    "teacher_id": "string",
    "prompt_id": "string",
}
KEY = ("edge_id", "sample_id")
