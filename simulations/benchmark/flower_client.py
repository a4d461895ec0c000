"""The ClientApp of the Flower variants: what a user of Flower and PEFT writes. Imported by the Ray actors."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from simulations.benchmark.plain import FEDERATED_RATE, arrays_of, build_model, train

app = ClientApp()
_cached: dict[str, PeftModel] = {}


@app.train()
def train_client(message: Message, context: Context) -> Message:
    """Train on the rows of this partition; with ``rebuild`` on a model that is built for this call only."""
    torch.set_num_threads(1)
    config = message.content.config_records["config"]
    folder, number = str(config["folder"]), int(config["number"])  # pyright: ignore[reportArgumentType]
    arrays = arrays_of(folder)
    model = build_model(Path(folder)) if config["rebuild"] else _model_of(folder)
    set_peft_model_state_dict(model, message.content.array_records["arrays"].to_torch_state_dict())
    batches = arrays.batches[number - 1, int(context.node_config["partition-id"])]
    metrics = MetricRecord({"train_loss": train(model, arrays, batches, FEDERATED_RATE), "num-examples": batches.size})
    reply = {"arrays": ArrayRecord(get_peft_model_state_dict(model)), "metrics": metrics}
    return Message(RecordDict(reply), reply_to=message)


def _model_of(folder: str) -> PeftModel:
    if folder not in _cached:
        _cached[folder] = build_model(Path(folder))
    return _cached[folder]
