"""The typed schema of a run: what Hydra composed, checked once, then immutable.

``conf/`` holds the values, this file their names and types. :func:`load_config` turns a composed mapping into a
:class:`Config` or raises :class:`~fedlora.errors.InputError` naming the setting and the nearest valid key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedlora.errors import InputError

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]
Model = TypeVar("Model", bound=BaseModel)


class Settings(BaseModel):
    """Base of every settings group: unknown keys are refused, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class BackboneConfig(Settings):
    """The frozen pretrained model, or the private models of the clients.

    Attributes:
        name: ``minilm`` or ``smollm2`` (packaged), ``hf`` (hub id or local folder in ``path``), ``random``
            (weights drawn from the seed) or ``heterogeneous`` (every client has a model of its own, and trains it).
        path: hub id or local folder.
        architecture: for ``random``: a model type of transformers, such as ``llama`` or ``vit``.
        settings: for ``random``: values of that architecture's configuration class.
        tokenizer: hub id or folder of the tokenizer where it is not that of ``path``.
        quantization: how the frozen weights are held; adapters stay fp32.
        attention: attention implementation of transformers (``eager``, ``sdpa``, ...); ``None``: its own choice.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time, the same numbers.
        models: for ``heterogeneous``: the clients' models, in turn; see :mod:`fedlora.personal.private_models`.
        width: for ``heterogeneous``: of the models' features; ``None``: that of the first model.
    """

    name: Literal["minilm", "smollm2", "hf", "random", "heterogeneous"]
    path: str | None = None
    architecture: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    tokenizer: str | None = None
    quantization: Literal["none", "int8", "nf4"] = "none"
    attention: str | None = None
    gradient_checkpointing: bool = False
    models: list[str] = Field(default_factory=list)
    width: Count | None = None


class SplitConfig(Settings):
    """How rows are divided. Fractions are per client; ``unseen_clients`` is a fraction of the clients.

    ``public_rows`` rows are taken from clients set aside for the server; they are nobody's training data.
    """

    validation: Fraction = 0.2
    test: Fraction = 0.2
    unseen_clients: Fraction = 0.2
    public_rows: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _leave_rows_to_train_on(self) -> SplitConfig:
        if self.validation + self.test >= 1.0:
            raise ValueError("validation + test must be below 1 so that rows are left to train on")
        return self


class DataConfig(Settings):
    """Where rows come from and which columns mean what.

    ``text``, ``text_pair`` and ``label`` name a column, or are a Jinja template over the columns of a row, such as
    ``{{ question }} Answer:``. For language models the prompt is ``text`` and the completion is ``label``.

    Attributes:
        name: the source.
        path: file, folder or hub id.
        subset: configuration of a hub dataset, such as ``sst2`` of ``nyu-mll/glue``.
        hub_split: the split of a hub dataset.
        text: the text, or a prompt.
        text_pair: a second text.
        label: the class, number, tags, completion or right choice.
        messages: dialogues, lists of {role, content}; instead of ``text`` and ``label``.
        choices: possible answers: a column of lists, or a list of columns.
        image: pictures.
        client: who owns the row.
        group: the group that the row's client belongs to, the same in all of its rows.
        labels: the classes or tags that all clients agree on, in the order of their numbers; ``None``: those that the
            rows have, sorted.
        limit: take the first rows only.
        split: how rows are divided.
    """

    name: str
    path: str | None = None
    subset: str | None = None
    hub_split: str = "train"
    text: str | None = "text"
    text_pair: str | None = None
    label: str | None = "label"
    messages: str | None = None
    choices: str | list[str] | None = None
    image: str | None = "image"
    client: str | None = None
    group: str | None = None
    labels: list[str] | None = None
    limit: Count | None = None
    split: SplitConfig = SplitConfig()


class PartitionConfig(Settings):
    """Who owns which row. ``natural`` uses the data's client column; the others come from flwr-datasets."""

    name: Literal["natural", "iid", "dirichlet", "pathological", "shard", "linear", "square", "exponential"]
    clients: Count | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    classes_per_client: Count | None = None
    shards_per_client: Count | None = None
    min_rows: Count = 3


class ClientConfig(Settings):
    """How one client trains in one round.

    Attributes:
        batch_size: rows of one forward pass.
        local_epochs: passes over the client's rows.
        local_steps: optimiser steps; replaces ``local_epochs`` when it is set.
        lr: the learning rate at its highest.
        optimizer: AdamW (Loshchilov and Hutter 2019) or plain SGD.
        schedule: how ``lr`` moves: over the whole run, or from the start in every round (``_restarts``).
        warmup: share of the schedule (the run, or each round) in which ``lr`` rises linearly.
        weight_decay: decoupled (AdamW) or L2 (SGD).
        max_grad_norm: the norm that the gradient of all trained tensors is clipped to.
        grad_accumulation: batches of ``batch_size`` rows that make one optimiser step.
        keep_optimizer: keep AdamW's moments at the client from round to round instead of starting them anew.
        max_length: tokens a row.
    """

    batch_size: Count
    local_epochs: Count
    local_steps: Count | None = None
    lr: Annotated[float, Field(gt=0)]
    optimizer: Literal["adamw", "sgd"]
    schedule: Literal["constant", "linear", "cosine", "linear_restarts", "cosine_restarts"]
    warmup: Fraction
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)] | None
    grad_accumulation: Count
    keep_optimizer: bool
    max_length: Annotated[int, Field(ge=4)]

    @model_validator(mode="after")
    def _moments_to_keep(self) -> ClientConfig:
        if self.keep_optimizer and self.optimizer == "sgd":
            raise ValueError(
                "client.keep_optimizer=true has no effect with client.optimizer=sgd, which keeps no moments"
            )
        return self


class CohortConfig(Settings):
    """Who trains in one round, and what the server takes of them.

    Attributes:
        size: clients of a round; ``None``: all.
        spares: further clients that are asked; of all usable replies the first ``size`` count.
        deadline: seconds that a round waits for replies; ``None``: until all are there.
        min_replies: with fewer usable replies a round leaves the global state as it is, and the run goes on; ``None``:
            one is enough, and the run ends where all clients of a round fail.
        max_examples: rows that a client may say it has, which is what its update counts; ``None``: any number.
        max_update_norm: of what a client may change in the tensors that it sends, all together; ``None``: any.
    """

    size: Count | None
    spares: Annotated[int, Field(ge=0)] = 0
    deadline: Annotated[float, Field(gt=0)] | None = None
    min_replies: Count | None = None
    max_examples: Count | None = None
    max_update_norm: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _possible(self) -> CohortConfig:
        if self.spares and self.size is None:
            raise ValueError("cohort.spares are asked beside cohort.size clients, and cohort.size=null asks all")
        if self.min_replies is not None and self.size is not None and self.min_replies > self.size:
            raise ValueError(f"cohort.min_replies = {self.min_replies} is more than cohort.size = {self.size} can send")
        return self


class FaultsConfig(Settings):
    """What goes wrong in a simulation: ``none``, or ``random`` faults from the seed.

    Attributes:
        name: whether anything does.
        dropout: probability that a client does no work in a round.
        crash: probability that it does its work and its reply is lost.
        delay: mean seconds until a reply is there; those after ``cohort.deadline`` are late.
    """

    name: Literal["none", "random"]
    dropout: Fraction = 0.0
    crash: Fraction = 0.0
    delay: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _of_random_only(self) -> FaultsConfig:
        foreign = [key for key in ("dropout", "crash", "delay") if self.name == "none" and getattr(self, key)]
        if foreign:
            raise ValueError(f"faults.{foreign[0]} is a setting of faults=random")
        return self


class CheckpointConfig(Settings):
    """A checkpoint is written every ``every`` rounds (0: never, the run cannot be resumed)."""

    every: Annotated[int, Field(ge=0)]


class EvalConfig(Settings):
    """Evaluation happens before the first round, every ``every`` rounds and after the last.

    Attributes:
        every: rounds between evaluations.
        batch_size: rows of one forward pass.
        max_rows: bound of the global validation and test sets; ``None``: no bound.
        max_clients: how many seen clients' own test rows are evaluated; ``None``: all.
        min_rows: clients with fewer rows of their own to be evaluated on are in no number of single clients.
        target: a value of the main metric on validation; the summary says when it was reached and at what cost.
        personalise: also train the global model on the rows of every evaluated client for a round, as that client
            would, and evaluate it on the client's own test rows; nothing of it is kept or sent.
        samples: test rows whose generated answers are shown after the run, before and after training.
    """

    every: Count
    batch_size: Count
    max_rows: Count | None
    max_clients: Count | None
    min_rows: Count = 1
    target: float | None = None
    personalise: bool = False
    samples: Annotated[int, Field(ge=0)] = 0


class EngineConfig(Settings):
    """What executes client work. ``auto`` chooses and writes its choice into ``config.yaml``.

    Attributes:
        name: the engine.
        workers: processes beside the main one (Ray actors); 0: none; ``None``: chosen.
        address: a Ray cluster to use, such as ``auto`` or ``10.0.0.1:6379``; ``None``: Ray is started here if needed.
        threads: CPU threads a process; ``None``: as many as PyTorch takes.
        tokens: tokens in one step of all clients of a cohort together; ``None``: measured at the start.
        packing: skip padding, and what of the last block nobody reads; the same numbers with less work.
    """

    name: Literal["auto", "loop", "cohort", "flower", "deploy"]
    workers: Annotated[int, Field(ge=0)] | None = None
    threads: Count | None = None
    tokens: Count | None = None
    address: str | None = None
    packing: bool = True


class PrivacyConfig(Settings):
    """Differential privacy: ``none``, of each ``record`` of a client's data, or of each ``client`` with all its data.

    Attributes:
        name: the unit that is protected.
        epsilon: what may be spent over the whole run; a client that would spend more sits out. ``None``: no bound.
        delta: ``None``: 1 / N^1.1 of N records of a client (``record``), or of N clients (``client``).
        noise_multiplier: standard deviation of the noise over the clipping norm; ``None``: solved for ``epsilon``.
        clip: norm that the gradient of a record, or the update of a client, is clipped to.
        accountant: how ``epsilon`` is computed: Renyi (``rdp``) or privacy-loss (``prv``, tighter, slower) accounting.
        rounds: of training that a client spreads its budget over (``record``); ``None``: every round of the run.
        send_counts: whether clients say how many rows they have; if not, all of them count the same (``record``).
        send_losses: whether clients send their training loss, which has no noise (``record``).
        clipping: whether ``clip`` stays (``fixed``) or is only the first and follows ``quantile`` (``client``).
        quantile: of the norms of updates that an adaptive ``clip`` moves towards (Andrew et al. 2021).
        noise: who adds it (``client``): the server to the sum, or each of the clients its share before it sends.
        secret_cohort: every client takes part in a round by a coin of its own, and no output says who did (``client``).
        secret: of a deployed server, from its operating system: what those coins are drawn from instead of the seed.
    """

    name: Literal["none", "record", "client"]
    epsilon: Annotated[float, Field(gt=0)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    noise_multiplier: Annotated[float, Field(ge=0)] | None = None
    clip: Annotated[float, Field(gt=0)] | None = None
    accountant: Literal["rdp", "prv"] = "rdp"
    rounds: Count | None = None
    send_counts: bool = True
    send_losses: bool = True
    clipping: Literal["fixed", "adaptive"] = "fixed"
    quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    noise: Literal["server", "clients"] = "server"
    secret_cohort: bool = False
    secret: int | None = None

    @model_validator(mode="after")
    def _of_clients_only(self) -> PrivacyConfig:
        only = {"clipping": "fixed", "quantile": None, "noise": "server", "secret_cohort": False}
        foreign = [key for key, usual in only.items() if getattr(self, key) != usual]
        if self.name != "client" and foreign:
            raise ValueError(f"privacy.{foreign[0]} is a setting of privacy=client")
        unused = [key for key in ("send_counts", "send_losses") if not getattr(self, key)]
        if self.name != "record" and unused:
            raise ValueError(f"privacy.{unused[0]} is a setting of privacy=record")
        if self.name == "client" and self.rounds is not None:
            raise ValueError(
                "privacy.rounds is a setting of privacy=record; the draws of a client are known in advance"
            )
        if (self.quantile is None) != (self.clipping == "fixed"):
            raise ValueError("privacy.quantile belongs to privacy.clipping=adaptive, which needs it, such as 0.5")
        if self.clipping == "adaptive" and self.noise == "clients":
            raise ValueError(
                "privacy.clipping=adaptive counts on the server which updates were clipped, and with "
                "privacy.noise=clients it sees none of them: use privacy.noise=server or privacy.clipping=fixed"
            )
        return self

    @model_validator(mode="after")
    def _something_to_reach(self) -> PrivacyConfig:
        if self.name != "none" and self.clip is None:
            raise ValueError("privacy.clip is missing: the norm that bounds what one record or client can change")
        if self.name != "none" and self.epsilon is None and self.noise_multiplier is None:
            raise ValueError("set privacy.epsilon (noise is solved for it) or privacy.noise_multiplier")
        return self


class TrackingConfig(Settings):
    """Where the numbers of every round are shown beside the run folder.

    Attributes:
        name: ``none``, a tracker that accelerate knows (``tensorboard``, ``wandb``, ``mlflow``, ...), or the import or
            file path of a class of one's own.
        project: under which runs are collected, where the tracker has projects.
        settings: further arguments of the tracker.
    """

    name: str
    project: str = "fedlora"
    settings: dict[str, Any] = {}


class WireConfig(Settings):
    """The number format of shared tensors on the wire. Strategies always see fp32."""

    dtype: Literal["fp32", "fp16", "bf16"]


class Config(Settings):
    """One run. ``task``, ``adapter`` and ``strategy`` are checked by the task, adapter and strategy they name.

    Attributes:
        precision: number format of the frozen weights and of what flows between them; what is trained, its optimiser
            and all sums on the server are fp32. ``auto``: bf16 where the machine multiplies it natively, else fp32.
    """

    seed: Annotated[int, Field(ge=0)]
    precision: Literal["auto", "fp32", "bf16"]
    rounds: Annotated[int, Field(ge=0)]
    run_dir: str
    method: str
    backbone: BackboneConfig
    task: dict[str, Any]
    data: DataConfig
    partition: PartitionConfig
    adapter: dict[str, Any]
    strategy: dict[str, Any]
    client: ClientConfig
    cohort: CohortConfig
    checkpoint: CheckpointConfig
    eval: EvalConfig
    engine: EngineConfig
    privacy: PrivacyConfig
    tracking: TrackingConfig
    wire: WireConfig
    faults: FaultsConfig = FaultsConfig(name="none")

    @model_validator(mode="after")
    def _fit_together(self) -> Config:
        if self.faults.delay and self.cohort.deadline is None:
            raise ValueError("faults.delay has no effect without cohort.deadline, the seconds that a round waits")
        if self.privacy.secret_cohort and (self.cohort.spares or self.cohort.min_replies is not None):
            raise ValueError(
                "privacy.secret_cohort=true draws every client by a coin of its own and tells nobody how many there "
                "were: set cohort.spares=0 and cohort.min_replies=null"
            )
        return self


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest valid word, or an empty string."""
    match = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


def load_config(values: Mapping[str, Any]) -> Config:
    """Check ``values`` (a composed, resolved configuration) against the schema.

    Raises:
        InputError: a key is unknown, missing or of the wrong type; the message names all of them.
    """
    return validate(Config, values)


def validate(model: type[Model], values: Mapping[str, Any], prefix: str = "") -> Model:
    """Build ``model`` from ``values``, explaining every problem with its full key (``prefix.key``)."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = [_explain(model, problem, prefix) for problem in error.errors()]
        raise InputError(" ".join(problems)) from None


def _explain(model: type[BaseModel], problem: Any, prefix: str) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join([prefix, *location] if prefix else location) or "the configuration"
    if problem["type"] == "extra_forbidden":
        valid = _fields_at(model, location[:-1])
        return f"Unknown setting '{key}'.{nearest(location[-1], valid)} Valid keys here: {', '.join(valid)}."
    if problem["type"] == "missing":
        return f"Setting '{key}' is missing."
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], dict):
        return f"Settings '{key}' are not valid: {message}."
    return f"Setting '{key}' = {problem['input']!r} is not valid: {message}."


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return sorted(model.model_fields)
