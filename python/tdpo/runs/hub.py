"""What is uploaded to a hub: the model whole, with its card, and checkpoints as they are; no working files of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import upload_folder
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..config import TDPOConfig
from .ending import PICTURE
from .samples import SAMPLES

_UNFINISHED = ("_*", "checkpoint-*", "*.part", f"{SAMPLES}/*")  # in an output folder: what is no result of the run
_TRAINING_STATE = (  # in a checkpoint, beside the model
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json", "manifest.json", "run.json"),
    *("global_step*", "latest", "zero_to_fp32.py", "pytorch_model_fsdp*"),  # of engines
)


class HubUploads(Trainer):
    """A Trainer with uploads of its own: transformers' would take caches and samples along, and parts of a model."""

    args: TDPOConfig
    # Trainer assigns None to both first, and annotates neither.
    hub_model_id: str | None  # type: ignore[assignment]
    push_in_progress: PushInProgress | None  # type: ignore[assignment]

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **details: Any,
    ) -> Any:
        """Saves the model and uploads it, as transformers does.

        Args:
            details: for the README, as `runs.model_card.model_card` takes them.
            others: as in `transformers.Trainer.push_to_hub`.
        """
        if self.hub_model_id is None:  # `push_to_hub` of the options is not set
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        name = Path(self.args.hub_model_id or self.args.output_dir).name
        tags = details.pop("tags", None) or []
        tags = [*([tags] if isinstance(tags, str) else tags), *(getattr(self.model, "model_tags", None) or [])]
        self.create_model_card(**{"model_name": name, **details, "tags": list(dict.fromkeys(tags))})
        return self.upload(commit_message, blocking=blocking, token=token, revision=revision)

    def upload(
        self,
        commit_message: str | None = "End of training",
        *,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
    ) -> Any:
        """Uploads what a finished run has saved in output_dir; the arguments are those of `push_to_hub`."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return self._upload_folder(
            self.args.output_dir,
            commit_message,
            [*_UNFINISHED, *self._caches()],
            token=token,
            revision=revision,
            run_as_future=not blocking,
        )

    def create_model_card(self, *args: Any, **details: Any) -> None:
        """Writes the README of the output folder again, with the picture of the log that lies there.

        `push_to_hub` passes on what it is told for the hub.

        Args:
            details: as `runs.model_card.model_card` takes them.
        """
        if self.is_world_process_zero():
            out = Path(self.args.output_dir)
            picture = PICTURE if Path(out, PICTURE).is_file() else None
            Path(out, "README.md").write_text(self.card(*args, picture=picture, **details))

    def card(self, **details: Any) -> str:
        """The README of the model as it is now."""
        raise NotImplementedError

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads the model of a finished checkpoint in the background, and the checkpoint if `hub_strategy` says so.

        Both are read where the checkpoint stays, so what is uploaded is what was saved.
        """
        push = self.push_in_progress
        if push is None or push.is_done():
            push = PushInProgress()
        elif not self.args.hub_always_push:
            return
        if self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message, name = f"Training in progress, step {self.state.global_step}", Path(checkpoint_folder).name
        jobs = [self._upload_folder(checkpoint_folder, message, list(_TRAINING_STATE))]
        places: dict[str, str] = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: name}
        if self.args.hub_strategy in places:
            place = places[self.args.hub_strategy]
            jobs.append(self._upload_folder(checkpoint_folder, f"{message}, checkpoint", [], path_in_repo=place))
        push.jobs.extend(jobs)  # type: ignore[union-attr]  # a list, which is annotated as one future
        self.push_in_progress = push

    def _upload_folder(
        self,
        folder: str,
        message: str | None,
        ignored: list[str],
        *,
        path_in_repo: str = "",
        token: str | None = None,
        revision: str | None = None,
        run_as_future: bool = True,
    ) -> Any:
        assert self.hub_model_id is not None  # `init_hf_repo` has run
        return upload_folder(  # type: ignore[call-overload]  # it takes any bool, but none of its overloads does
            repo_id=self.hub_model_id,
            folder_path=folder,
            path_in_repo=path_in_repo,
            commit_message=message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            ignore_patterns=ignored,
            run_as_future=run_as_future,
        )

    def _caches(self) -> list[str]:
        """The reference's cache, where it lies in the output folder."""
        output_dir, cache = (Path(folder).resolve() for folder in (self.args.output_dir, self.args.reference_folder))
        return [f"{cache.relative_to(output_dir)}/*"] if output_dir in cache.parents else []
