"""Which samples are never distilled: fresh traffic on which a share of cloud calls can be read without bias.

What escalated is hard, so the stream less what was distilled is easy, and an ε read off it sends up far more than it says
(measured on CLINC150: 21 % where 10 % was meant). So a tenth of all samples is set aside by a hash, the same in every round.
"""

from __future__ import annotations

import zlib

from kcm.sample import Payload

SHARE = 0.1


def reserved(payload: Payload) -> bool:
    """True for a tenth of all samples, the same ones everywhere."""
    return zlib.crc32(payload.encode() if isinstance(payload, str) else payload) % 1000 < 1000 * SHARE
