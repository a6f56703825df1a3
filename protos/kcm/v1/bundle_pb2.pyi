from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class BundleInfo(_message.Message):
    __slots__ = ("bundle_id", "task_id", "label_space", "precision", "calibration_id", "round", "engine")
    BUNDLE_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    LABEL_SPACE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    bundle_id: str
    task_id: str
    label_space: str
    precision: str
    calibration_id: str
    round: int
    engine: str
    def __init__(self, bundle_id: _Optional[str] = ..., task_id: _Optional[str] = ..., label_space: _Optional[str] = ..., precision: _Optional[str] = ..., calibration_id: _Optional[str] = ..., round: _Optional[int] = ..., engine: _Optional[str] = ...) -> None: ...
