"""What happens between two steps: write the log, watch the channel, probe the teacher, save."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from adaptkit.backbones import Backbone
from adaptkit.checkpoints import LAST, load_tensors, save_tensors, with_prefix
from adaptkit.errors import NotFinite
from adaptkit.run import Run
from adaptkit.select import Candidate, Judge, choose
from adaptkit.session import Reporter, Session
from adaptkit.signals import StopRequest

INTERRUPTED = "interrupted"
REST = 2  # a fresh head's detectors rest for this many warm-ups


class Supervisor:
    """Called after every step; its answer ends the loop: `interrupted`, the reason of a collapse, or None."""

    def __init__(self, session: Session, run: Run, judge: Judge, reporter: Reporter, stop: StopRequest) -> None:
        self.session, self.run, self.judge, self.reporter, self.stop = session, run, judge, reporter, stop
        self.last = run.path / LAST
        self.folder = self.last.parent

    def __call__(self, step: int) -> str | None:
        s, plan = self.session, self.session.plan
        log_due = step % s.recipe.log_every == 0 or step == plan.total_steps
        if log_due and (problem := self._log(step)):
            return problem
        if plan.is_probe(step) and self._may_take_candidate(step):
            if not self._is_finite():  # between two lines of the log; a probe of NaN says nothing
                return "the weights are not finite"
            try:
                self._take_candidate(step)
            except NotFinite:  # finite weights may be too large for what the backbone computes with them
                return "the teacher's embeddings are not finite"
        stopping = self._must_stop(log_due)
        if stopping or plan.is_checkpoint(step):
            self.save()
        return INTERRUPTED if stopping else None

    def save(self) -> None:
        """Save the state, unless the weights are not finite: the last good checkpoint is worth more."""
        if self._is_finite():
            self.session.save(self.last)
            self._prune()

    def _is_finite(self) -> bool:
        return bool(torch.stack([p.isfinite().all() for p in self.session.student.parameters()]).all())

    def candidates(self) -> list[Candidate]:
        """The candidates taken so far."""
        return [Candidate.from_json(state) for state in self.session.state.candidates]

    def candidate_file(self, step: int) -> Path:
        """Where the teacher of that step lies."""
        return self.folder / f"candidate-{step:08d}.safetensors"

    def candidate_weights(self, step: int) -> dict[str, Tensor]:
        """The backbone of a candidate, as a state dict."""
        return with_prefix(load_tensors(self.candidate_file(step))[0], "backbone.")

    def teacher_backbone(self) -> Backbone:
        """The teacher as a backbone that can be probed and exported."""
        return replace(self.session.backbone, module=self.session.teacher.backbone)

    def _log(self, step: int) -> str | None:
        """One line of `metrics.jsonl`; the reason to act if the channel diverged or collapsed."""
        s = self.session
        images, seconds, wait = s.meter.total_images, s.meter.total_seconds, s.meter.total_wait
        record = s.meter.read()
        record |= {"lr": s.plan.lr(step - 1) * s.state.lr_factor, "momentum": s.plan.momentum(step - 1)}
        s.state.images += s.meter.total_images - images
        s.state.seconds += s.meter.total_seconds - seconds
        s.state.wait += s.meter.total_wait - wait
        s.state.last_record = record
        if s.accelerator.is_main_process:
            self.run.log({"step": step, "kind": "train"} | record)
            self.reporter.training(step, s.plan.total_steps, record)
        return s.state.channel.update(record, s.objective.health(record), resting=self._is_resting(step))

    def _is_resting(self, step: int) -> bool:
        return step < self.session.state.last_draw + REST * self.session.plan.head_warmup

    def _may_take_candidate(self, step: int) -> bool:
        """Not while the backbone was frozen all along, nor before a fresh head's information is back."""
        last_line = step - step % self.session.recipe.log_every if step < self.session.plan.total_steps else step
        known = last_line > self.session.state.last_draw  # else the information is that of the head before
        return known and not self._is_resting(step) and self.session.state.channel.transmits

    def _take_candidate(self, step: int) -> None:
        started = time.perf_counter()
        s = self.session
        candidate = self.judge.consider(self.teacher_backbone(), step, alpha=1.0)
        s.state.candidates.append(candidate.to_json())
        if s.accelerator.is_main_process:
            save_tensors(self.candidate_file(step), s.teacher.state_dict(), {"step": step})
            before = self.judge.original_selection.scores[self.judge.metric].value
            self.run.log({"step": step, "kind": "evaluation", "metric": self.judge.metric, **candidate.to_json()})
            delta = candidate.delta
            self.reporter.evaluation(step, self.judge.metric, before, candidate.value, delta.lo, delta.hi)
        s.meter.exclude(time.perf_counter() - started)

    def _prune(self) -> None:
        """Keep the files of the best candidates. After the save: an older checkpoint never names a missing file."""
        candidates = self.candidates()
        ranked = sorted(candidates, key=lambda c: c.value, reverse=True)
        chosen = choose(candidates)  # need not be among the highest values: theirs may be in doubt
        if self.session.accelerator.is_main_process:
            for candidate in ranked[self.session.recipe.select.keep :]:
                if candidate != chosen:
                    self.candidate_file(candidate.step).unlink(missing_ok=True)

    def _must_stop(self, may_ask_others: bool) -> bool:
        """A signal to any process stops all; they agree at lines of the log, where they synchronise anyway."""
        accelerator = self.session.accelerator
        if accelerator.num_processes == 1:
            return self.stop.received
        if not may_ask_others:
            return False
        received = torch.tensor([float(self.stop.received)], device=accelerator.device)
        return bool(accelerator.reduce(received, reduction="sum").item() > 0)
