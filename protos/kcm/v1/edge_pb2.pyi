from protos.kcm.v1 import bundle_pb2 as _bundle_pb2
from protos.kcm.v1 import sample_pb2 as _sample_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Route(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AUTO: _ClassVar[Route]
    LOCAL: _ClassVar[Route]
    CLOUD: _ClassVar[Route]
AUTO: Route
LOCAL: Route
CLOUD: Route

class InferSample(_message.Message):
    __slots__ = ("sample_id", "payload", "route")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    payload: _sample_pb2.Payload
    route: Route
    def __init__(self, sample_id: _Optional[str] = ..., payload: _Optional[_Union[_sample_pb2.Payload, _Mapping]] = ..., route: _Optional[_Union[Route, str]] = ...) -> None: ...

class InferRequest(_message.Message):
    __slots__ = ("samples",)
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    samples: _containers.RepeatedCompositeFieldContainer[InferSample]
    def __init__(self, samples: _Optional[_Iterable[_Union[InferSample, _Mapping]]] = ...) -> None: ...

class InferAnswer(_message.Message):
    __slots__ = ("sample_id", "label_id", "label", "source", "confidence", "candidates", "model_id", "reason")
    class Source(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        SOURCE_UNSPECIFIED: _ClassVar[InferAnswer.Source]
        SOURCE_LOCAL: _ClassVar[InferAnswer.Source]
        SOURCE_CLOUD: _ClassVar[InferAnswer.Source]
        SOURCE_DEGRADED: _ClassVar[InferAnswer.Source]
    SOURCE_UNSPECIFIED: InferAnswer.Source
    SOURCE_LOCAL: InferAnswer.Source
    SOURCE_CLOUD: InferAnswer.Source
    SOURCE_DEGRADED: InferAnswer.Source
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    LABEL_ID_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    label_id: int
    label: str
    source: InferAnswer.Source
    confidence: float
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    model_id: str
    reason: str
    def __init__(self, sample_id: _Optional[str] = ..., label_id: _Optional[int] = ..., label: _Optional[str] = ..., source: _Optional[_Union[InferAnswer.Source, str]] = ..., confidence: _Optional[float] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., model_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("label_id", "probability")
    LABEL_ID_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    label_id: int
    probability: float
    def __init__(self, label_id: _Optional[int] = ..., probability: _Optional[float] = ...) -> None: ...

class InferReply(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[InferAnswer]
    def __init__(self, answers: _Optional[_Iterable[_Union[InferAnswer, _Mapping]]] = ...) -> None: ...

class Truth(_message.Message):
    __slots__ = ("sample_id", "label")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    label: str
    def __init__(self, sample_id: _Optional[str] = ..., label: _Optional[str] = ...) -> None: ...

class FeedbackRequest(_message.Message):
    __slots__ = ("truths",)
    TRUTHS_FIELD_NUMBER: _ClassVar[int]
    truths: _containers.RepeatedCompositeFieldContainer[Truth]
    def __init__(self, truths: _Optional[_Iterable[_Union[Truth, _Mapping]]] = ...) -> None: ...

class FeedbackReply(_message.Message):
    __slots__ = ("kept", "matched", "dropped")
    KEPT_FIELD_NUMBER: _ClassVar[int]
    MATCHED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    kept: int
    matched: int
    dropped: int
    def __init__(self, kept: _Optional[int] = ..., matched: _Optional[int] = ..., dropped: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("bundle", "cloud", "answered_local", "answered_cloud", "answered_degraded", "spool_depth", "last_refusal", "epsilon", "guaranteed", "drift", "explored", "feedback")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    CLOUD_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_LOCAL_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_CLOUD_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_DEGRADED_FIELD_NUMBER: _ClassVar[int]
    SPOOL_DEPTH_FIELD_NUMBER: _ClassVar[int]
    LAST_REFUSAL_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    GUARANTEED_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    EXPLORED_FIELD_NUMBER: _ClassVar[int]
    FEEDBACK_FIELD_NUMBER: _ClassVar[int]
    bundle: _bundle_pb2.BundleInfo
    cloud: str
    answered_local: int
    answered_cloud: int
    answered_degraded: int
    spool_depth: int
    last_refusal: str
    epsilon: float
    guaranteed: bool
    drift: str
    explored: int
    feedback: int
    def __init__(self, bundle: _Optional[_Union[_bundle_pb2.BundleInfo, _Mapping]] = ..., cloud: _Optional[str] = ..., answered_local: _Optional[int] = ..., answered_cloud: _Optional[int] = ..., answered_degraded: _Optional[int] = ..., spool_depth: _Optional[int] = ..., last_refusal: _Optional[str] = ..., epsilon: _Optional[float] = ..., guaranteed: bool = ..., drift: _Optional[str] = ..., explored: _Optional[int] = ..., feedback: _Optional[int] = ...) -> None: ...
