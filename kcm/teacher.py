"""The teacher store's rows: what the cloud writes and distillation reads.

STORE/inbox-<replica>.db   SQLite, committed before the reply; at least once per (edge_id, sample_id) and replica. Truths that
                           applications told stand in it as well, apart from the rows.
STORE/parquet/*.parquet    compacted: exactly once per (edge_id, sample_id), the first commit wins

A truth may come before its row, with it, or long after, and to another replica: compaction writes the last one into the
row's `label`. For a row that is in a part already it writes that part again, under the same name, in one rename: so a reader
finds whole parts, each row once, and nothing to join. Parts of an older kcm lack the columns of ADDED: read them as null.
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
    "p_hint": "float",  # probability with which the edge showed its hint; strictly between 0 and 1: chance decided, an experiment
    "label": "int16",  # the truth, a label id, where an application told it; else null
}
KEY = ("edge_id", "sample_id")
ADDED = ("p_hint", "label")  # since the first release
