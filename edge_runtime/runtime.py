"""One bundle, ready to answer: preprocess → one run of the fused graph → policy.

EdgeRuntime.load(path).infer([Sample(payload="...")])   in process, without a cloud
Router                                                   with cloud and spool: what the daemon runs
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from edge_runtime.engines.onnx import OrtBackend
from edge_runtime.engines.protocol import Backend, Engine, Outputs
from edge_runtime.golden import check_golden
from kcm.bundle import Bundle, Manifest, Precision, golden_name, load_bundle
from kcm.calibration import Calibration
from kcm.errors import BundleError, EngineError
from kcm.policy import stays_local
from kcm.preprocess import Inputs, Preprocessor, batch_of, load_preprocessor, longest_of
from kcm.sample import Answer, Float32, Hint, Sample, Source, Tensors, new_sample_id
from kcm.task import Task

log = logging.getLogger("kcm.edge.runtime")

NO_CLOUD = "no cloud configured"
CPU = OrtBackend("onnx-cpu")


class InvalidSample(ValueError):
    """The caller's fault; the message names the sample's index."""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What the device knows of one sample. `answer` is the small model's, as if LOCAL."""

    sample: Sample
    answer: Answer
    local: bool  # the policy keeps it here
    score: float  # the routing score
    logits: Float32  # [C]
    hint: Hint | None  # None: the numbers aren't finite


class EdgeRuntime:
    """A verified bundle with its engine. Immutable: a swap replaces the whole object."""

    def __init__(
        self,
        *,
        manifest: Manifest,
        task: Task,
        calibration: Calibration,
        precision: Precision,
        preprocessor: Preprocessor,
        engine: Engine,
        engine_name: str = "",
        spare: Callable[[], Engine] | None = None,
    ) -> None:
        """
        Args:
            spare: makes the engine that takes over for good where this one fails in service.
        """
        self.manifest, self.task, self.calibration, self.precision = manifest, task, calibration, precision
        self.engine = engine_name
        self._preprocessor, self._engine = preprocessor, engine
        self._spare, self._lock = spare, threading.Lock()
        # A swap can't know when the last request that holds this is through; the collector does.
        self._close = weakref.finalize(self, engine.close)

    @classmethod
    def load(cls, path: str | Path, precision: Precision = "fp32", backend: Backend | None = None) -> EdgeRuntime:
        """Read, verify and warm a bundle.

        Args:
            backend: what runs its graph; default: ONNX Runtime on the CPU.

        Raises:
            BundleError: damaged, of another signature, or with golden outputs that this device doesn't reproduce.
            EngineError: this machine can't run it with that backend.
            MissingExtraError: no ONNX Runtime is installed.
        """
        return cls.from_bundle(load_bundle(Path(path)), precision, backend)

    @classmethod
    def from_bundle(
        cls, bundle: Bundle, precision: Precision = "fp32", backend: Backend | None = None, spare: Callable[[], Engine] | None = None
    ) -> EdgeRuntime:
        """As `load`, from a bundle that was read already."""
        backend = backend or CPU
        preprocessor = load_preprocessor(bundle.task.preprocess, bundle.files)
        reads, made = bundle.manifest.graph.inputs, longest_of(preprocessor)
        if reads != made:
            said = (", ".join(f"{name} (up to {longest})" for name, longest in inputs.items()) for inputs in (reads, made))
            raise BundleError("{}: its graph reads {}; this kcm makes {}".format(bundle.path, *said), fix="export it again with this kcm")
        engine = backend.load(bundle.model(precision), bundle.manifest.graph, len(bundle.task.labels))
        if (name := golden_name(precision)) not in bundle.files:
            raise BundleError(f"{bundle.path} has no {name}")
        try:
            check_golden(engine, preprocessor, bundle.files[name], precision)
        except BaseException:
            engine.close()
            raise
        # The bundle's bytes aren't kept: the session has its own copy.
        return cls(
            manifest=bundle.manifest,
            task=bundle.task,
            calibration=bundle.calibration[precision],
            precision=precision,
            preprocessor=preprocessor,
            engine=engine,
            engine_name=backend.name,
            spare=spare,
        )

    @property
    def bundle_id(self) -> str:
        return self.manifest.bundle_id

    @property
    def epsilon(self) -> float:
        return self.calibration.epsilon

    @property
    def provider(self) -> str:
        """What runs the graph, as the runtime reports it."""
        return self._engine.provider

    def infer(self, samples: Sequence[Sample]) -> list[Answer]:
        """Answer every sample on this device, in order.

        A sample that the policy would escalate gets the small model's answer as DEGRADED.

        Raises:
            InvalidSample: another modality, or a sample_id twice; the message names the sample's index.
            TypeError: no sequence of Sample.
        """
        check_samples(samples)
        return [d.answer if d.local else degraded(d.answer, NO_CLOUD) for d in self.decide(samples)]

    def decide(self, samples: Sequence[Sample], first: int = 0) -> list[Decision]:
        """The small model's answer for every sample, and whether the policy keeps it here.

        Args:
            first: index of samples[0] in the caller's request, for the message of an error.

        Raises:
            InvalidSample: a payload of another modality, or tensors that the graph can't read; the message names the sample's index.
            EngineError: the engine failed, and there is no spare one.
        """
        decisions: list[Decision] = []
        step = self.manifest.graph.max_batch
        for start in range(0, len(samples), step):
            part = samples[start : start + step]
            inputs = self._inputs(part, first + start)
            with self._lock:  # the outputs are the engine's own until they were read
                decisions += self._decide(part, self._run(inputs))
        return decisions

    def _run(self, inputs: Inputs) -> Outputs:
        try:
            return self._engine.infer(inputs)
        except EngineError as error:
            if self._spare is None:
                raise
            # A device that failed once is not asked again: its context may be gone, and each try could cost a second.
            failed, self._engine, self._spare = self._engine, self._spare(), None
            log.error("%s failed and serves no more, %s does: %s", failed.provider, self._engine.provider, error.message)
            self.engine = CPU.name
            self._close()
            self._close = weakref.finalize(self, self._engine.close)
            return self._engine.infer(inputs)

    def _decide(self, samples: Sequence[Sample], outputs: Outputs) -> list[Decision]:
        ids, probabilities, confidences = outputs.top_ids.tolist(), outputs.top_probs.tolist(), outputs.confidence.tolist()
        scores = outputs.score.tolist()
        labels, epsilon = self.task.labels, self.calibration.epsilon
        rows = outputs.logits.copy()  # the engine's own are overwritten by the next call
        decisions = []
        for row, sample in enumerate(samples):
            confidence = confidences[row]
            answer = Answer(
                sample_id=sample.sample_id or new_sample_id(),
                label_id=ids[row][0],
                label=labels[ids[row][0]],
                source=Source.LOCAL,
                confidence=confidence,
                candidates=tuple(zip(ids[row], probabilities[row], strict=True)),
                model_id=self.manifest.bundle_id,
            )
            local = stays_local(scores[row], epsilon, sample.route)
            logits = rows[row]
            hint = None if local or not is_finite(logits, confidence) else _hint(ids[row], probabilities[row], confidence)
            decisions.append(Decision(sample=sample, answer=answer, local=local, score=scores[row], logits=logits, hint=hint))
        return decisions

    def _inputs(self, samples: Sequence[Sample], start: int) -> Inputs:
        try:
            return batch_of([sample.payload for sample in samples], self._preprocessor)
        except ValueError:
            for row, sample in enumerate(samples):
                try:
                    batch_of([sample.payload], self._preprocessor)
                except ValueError as error:
                    raise InvalidSample(f"sample {start + row}: {error}") from error
            raise


def degraded(answer: Answer, reason: str) -> Answer:
    """The small model's answer, since the cloud's did not come."""
    return msgspec.structs.replace(answer, source=Source.DEGRADED, reason=reason)


def check_samples(samples: Sequence[Sample]) -> None:
    """What an application in the same process may get wrong.

    Raises:
        TypeError: `samples` is one sample or bare texts.
        InvalidSample: a payload is neither text, bytes nor tensors, or a sample_id appears twice: the answer to which would be which?
    """
    given: object = samples
    if isinstance(given, (str, bytes, Sample)):
        raise TypeError(f"infer takes a sequence of Sample, not one {type(given).__name__}: infer([Sample(payload=...)])")
    seen: dict[str, int] = {}
    for index, sample in enumerate(samples):
        item: object = sample
        if not isinstance(item, Sample):
            raise TypeError(f"sample {index} is of type {type(item).__name__}: wrap it, infer([Sample(payload=...)])")
        payload: object = item.payload
        if not isinstance(payload, (str, bytes, Tensors)):
            raise InvalidSample(
                f"sample {index}: its payload is of type {type(payload).__name__}: give str, bytes (an image file) or Tensors"
            )
        if sample.sample_id and (first := seen.setdefault(sample.sample_id, index)) != index:
            raise InvalidSample(f"sample {index} has the sample_id of sample {first}: {sample.sample_id!r}")


def is_finite(logits: Float32, confidence: float) -> bool:
    """False: the model broke on this sample, and its numbers are worth nothing to anybody."""
    return bool(np.isfinite(logits).all() and np.isfinite(confidence))


def _hint(ids: list[int], probabilities: list[float], confidence: float) -> Hint:
    # float32 sums can end a hair above one; the cloud refuses that
    clipped = tuple(min(max(p, 0.0), 1.0) for p in probabilities)
    return Hint(label_ids=tuple(ids), probabilities=clipped, confidence=min(max(confidence, 0.0), 1.0))
