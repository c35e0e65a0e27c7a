"""What we assume of the Trainer's private parts."""

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from efx_plugin.training import EfficientXpertCallback
from tests.upstream.contract import holds, takes

HOST, USER = "transformers", "efx_plugin.training.callback"


class Reporter(TrainerCallback):
    """Keeps the logs that it got."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


class Speaker(EfficientXpertCallback):
    """Adds to the logs as if it had just pruned."""

    def report(self, state, logs):
        self.stored = dict(state.log_history[-1])
        logs["sparsity"] = 0.5


def test_a_reporter_that_is_called_earlier_gets_what_is_added(tmp_path):
    takes(CallbackHandler.on_log.__wrapped__, ["args", "state", "control", "logs"], HOST, USER)
    reporter, speaker = Reporter(), Speaker()
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=arguments, callbacks=[reporter, speaker])
    callbacks = trainer.callback_handler.callbacks
    holds(callbacks.index(reporter) < callbacks.index(speaker), HOST, "callbacks are called in another order", USER)
    trainer.log({"loss": 1.0})
    holds(reporter.logs[0].get("sparsity") == 0.5, HOST, "logs do not go through CallbackHandler.on_log", USER)
    holds(speaker.stored["loss"] == 1.0, HOST, "the Trainer fills log_history after calling its reporters", USER)


def test_checkpoints_are_named_by_their_step():
    holds(PREFIX_CHECKPOINT_DIR == "checkpoint", HOST, f"checkpoints are called {PREFIX_CHECKPOINT_DIR}-STEP", USER)
