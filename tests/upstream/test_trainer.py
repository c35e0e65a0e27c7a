"""What we assume of the Trainer's private parts."""

import inspect

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from efx_plugin.training import EfficientXpertCallback
from tests.upstream.contract import holds

HOST, USER = "transformers", "efx_plugin.training.callback"


class Reporter(TrainerCallback):
    """Keeps the logs that it got."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


class Speaker(EfficientXpertCallback):
    """Adds to the logs as if it had just pruned."""

    def on_train_begin(self, args, state, control, **kwargs):
        pass

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.stored = dict(state.log_history[-1])
        logs["sparsity"] = 0.5


def test_a_reporter_gets_what_is_added_before_it_is_called(tmp_path):
    reporter, speaker = Reporter(), Speaker()
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=arguments, callbacks=[reporter, speaker])
    handler = trainer.callback_handler
    holds(handler.callbacks.index(reporter) < handler.callbacks.index(speaker), HOST, "the order is another", USER)
    handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    trainer.log({"loss": 1.0})
    holds(reporter.logs[0].get("sparsity") == 0.5, HOST, "callbacks are not called in the order of the list", USER)
    holds(speaker.stored["loss"] == 1.0, HOST, "the Trainer fills log_history after calling its reporters", USER)


def test_the_handler_is_told_that_training_begins():
    source = inspect.getsource(Trainer)
    begins = "self.callback_handler.on_train_begin(" in source
    holds(begins, HOST, "the Trainer does not call CallbackHandler.on_train_begin", USER)


def test_checkpoints_are_named_by_their_step():
    holds(PREFIX_CHECKPOINT_DIR == "checkpoint", HOST, f"checkpoints are called {PREFIX_CHECKPOINT_DIR}-STEP", USER)
