"""What happens between two steps: write the log, watch the channel, probe the teacher, save."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from adaptkit.backbones import Backbone
from adaptkit.checkpoints import LAST, PREVIOUS, candidate_file, load_tensors, save_tensors, with_prefix
from adaptkit.collapse import MIN_VIEWS, RANK, LastInput, effective_directions
from adaptkit.distill import Branch
from adaptkit.errors import NotFinite
from adaptkit.processes import on_main
from adaptkit.recovery import drop_orphans
from adaptkit.run import Run
from adaptkit.select import Candidate, Judge, choose
from adaptkit.session import Reporter, Session
from adaptkit.signals import StopRequest
from adaptkit.tuning import merged

INTERRUPTED = "interrupted"
REST = 2  # a fresh head's detectors rest for this many warm-ups


class Supervisor:
    """Called after every step; its answer ends the loop: `interrupted`, the reason of a collapse, or None."""

    def __init__(
        self,
        session: Session,
        run: Run,
        judge: Judge,
        reporter: Reporter,
        stop: StopRequest,
        share_failures: Callable[[], None] = lambda: None,
    ) -> None:
        self.session, self.run, self.judge, self.reporter, self.stop = session, run, judge, reporter, stop
        self.share_failures = share_failures
        self.last = run.path / LAST
        self.folder = self.last.parent
        self.previous = run.path / PREVIOUS
        self.surplus: list[Path] = []  # candidates that `last` does not need
        self.embeddings = LastInput(session.teacher.head)

    def __call__(self, step: int) -> str | None:
        reason = self._between_steps(step)
        if reason is not None and reason != INTERRUPTED:
            on_main(lambda: self._give_up(step, reason))  # all go back to the same checkpoint
        return reason

    def _give_up(self, step: int, reason: str) -> None:
        self.run.log({"step": step, "kind": "collapse", "reason": reason})
        with suppress(FileNotFoundError):
            os.replace(self.previous, self.last)
        self.surplus = []

    def _between_steps(self, step: int) -> str | None:
        s, plan = self.session, self.session.plan
        log_due = step % s.recipe.log_every == 0 or step == plan.total_steps
        if log_due or plan.is_checkpoint(step):
            self.share_failures()
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
            if not stopping and not self._is_finite():
                return "the weights are not finite"
            self.save()
        return INTERRUPTED if stopping else None

    def save(self) -> None:
        """Save the state, unless it is not finite: the last good checkpoint is worth more.

        What an update did shows in the next step. So the checkpoint before, and the candidates that it names, stay
        until a line of the log is good.
        """
        s = self.session
        if not self._is_finite():
            return
        if s.accelerator.is_main_process and s.state.step < s.plan.total_steps:
            with suppress(OSError):  # it is there, there is nothing yet to keep, or the disk knows no hard links
                os.link(self.last, self.previous)
        s.save(self.last)
        if self.previous.exists():
            self.surplus = self._surplus()
        else:
            self._prune()

    def _is_finite(self) -> bool:
        """Of student and teacher: BatchNorm may be infinite in the teacher alone."""
        s = self.session
        tensors = [*s.student.state_dict().values(), *s.teacher.state_dict().values()]
        return bool(torch.stack([t.isfinite().all() for t in tensors if t.is_floating_point()]).all())

    def tidy(self) -> None:
        """At the end of the run: what is no longer needed, or was never named by a checkpoint, goes."""
        self.previous.unlink(missing_ok=True)
        drop_orphans(self.folder, self.candidates())

    def candidates(self) -> list[Candidate]:
        """The candidates taken so far."""
        return [Candidate.from_json(state) for state in self.session.state.candidates]

    def candidate_weights(self, step: int) -> dict[str, Tensor]:
        """The backbone of a candidate, as a state dict."""
        return with_prefix(load_tensors(candidate_file(self.folder, step))[0], "backbone.")

    def teacher_backbone(self) -> Backbone:
        """The teacher as a backbone that can be probed and exported: LoRA leaves the training pair here, merged."""
        original = self.session.backbone
        return replace(original, module=merged(original.module, self.session.teacher.backbone))

    def _log(self, step: int) -> str | None:
        """One line of `metrics.jsonl`; the reason to act if the channel diverged or collapsed."""
        s = self.session
        images, seconds, wait = s.meter.total_images, s.meter.total_seconds, s.meter.total_wait
        record = s.meter.read() | self._rank()
        record |= {"lr": s.plan.lr(step - 1) * s.state.lr_factor, "momentum": s.plan.momentum(step - 1)}
        s.state.images += s.meter.total_images - images
        s.state.seconds += s.meter.total_seconds - seconds
        s.state.wait += s.meter.total_wait - wait
        s.state.last_record = record
        on_main(lambda: self.run.log({"step": step, "kind": "train"} | record))
        if s.accelerator.is_main_process:
            self.reporter.training(step, s.plan.total_steps, record)
        resting = self._is_resting(step) or step < s.plan.lr_warmup
        reason = s.state.channel.update(record, s.objective.health(record), resting)
        if s.accelerator.is_main_process and reason is None and s.state.channel.bad_windows == 0:
            for file in (self.previous, *self.surplus):
                file.unlink(missing_ok=True)
            self.surplus = []
        return reason

    def _rank(self) -> dict[str, float]:
        """Effective directions of the teacher's embeddings of the last batch, that of all processes."""
        if self.embeddings.rows is None:
            return {}
        embeddings = self.session.accelerator.gather(self.embeddings.rows)
        return {RANK: float(effective_directions(embeddings))} if len(embeddings) >= MIN_VIEWS else {}

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
        adapted = self.teacher_backbone()
        candidate = self.judge.consider(adapted, step, alpha=1.0)
        s.state.candidates.append(candidate.to_json())
        on_main(lambda: self._keep(candidate, adapted))
        if s.accelerator.is_main_process:
            before = self.judge.original_selection.scores[self.judge.metric].value
            delta = candidate.delta
            self.reporter.evaluation(step, self.judge.metric, before, candidate.value, delta.lo, delta.hi)
        s.meter.exclude(time.perf_counter() - started)

    def _keep(self, candidate: Candidate, adapted: Backbone) -> None:
        weights = Branch(adapted.module, self.session.teacher.head).state_dict()
        save_tensors(candidate_file(self.folder, candidate.step), weights, {"step": candidate.step})
        line = {"step": candidate.step, "kind": "evaluation", "metric": self.judge.metric}
        self.run.log(line | candidate.to_json())

    def _prune(self) -> None:
        """Keep the files of the best candidates. After the save: an older checkpoint never names a missing file."""
        if self.session.accelerator.is_main_process:
            for file in self._surplus():
                file.unlink(missing_ok=True)

    def _surplus(self) -> list[Path]:
        """Files of candidates that are neither among the best nor the one that would be chosen now."""
        candidates = self.candidates()
        ranked = sorted(candidates, key=lambda c: c.value, reverse=True)
        chosen = choose(candidates)  # need not be among the highest values: theirs may be in doubt
        return [candidate_file(self.folder, c.step) for c in ranked[self.session.recipe.select.keep :] if c != chosen]

    def _must_stop(self, may_ask_others: bool) -> bool:
        """A signal to any process stops all; they agree at lines of the log, where they synchronise anyway."""
        accelerator = self.session.accelerator
        if accelerator.num_processes == 1:
            return self.stop.received
        if not may_ask_others:
            return False
        received = torch.tensor([float(self.stop.received)], device=accelerator.device)
        return bool(accelerator.reduce(received, reduction="sum").item() > 0)
