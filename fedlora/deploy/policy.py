"""The policy of a client: what its owner allows, in a file of the owner's, which no server can override.

A run is checked before anything of it is loaded, again when the client knows its rows, and at every message. A reason
goes to the server, so it names settings and limits but never a number that the client's data decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from fedlora.config import Config, Count, Settings, validate
from fedlora.deploy.allowance import Used
from fedlora.deploy.cost import UNBOUNDED, Cost, own_cost, own_noise, promised_cost, record_cost
from fedlora.errors import InputError, PolicyError
from fedlora.protocol import EPSILON, EXAMPLES

STRENGTH = {"none": 0, "record": 1, "client": 2}


class Policy(Settings):
    """What a client's owner allows. Every limit that is ``null`` is none.

    Attributes:
        privacy: what a run must protect at least: nothing, each ``record``, or the ``client`` with all its rows (which
            protects each record, too).
        max_epsilon: that all runs of this client together may cost. A run counts from its first round on.
        max_delta: likewise.
        trust_server_noise: whether noise that the server promises to add counts. If not, ``privacy=client`` counts
            with ``privacy.noise=clients`` only, and by this client's own share of the noise.
        max_rounds: of training in one run; a round that is repeated counts again.
        max_local_steps: optimiser steps in one round.
        max_upload_bytes: of all messages of one run.
        max_download_bytes: likewise.
        min_rows: with fewer training rows this client does not take part.
        runs: fingerprints of the terms of runs that it takes part in; ``null``: any.
        code: hashes of the installed code that may run; ``null``: any.
        metrics: names of numbers that may be sent with an update; ``null``: all. Without ``num-examples`` the client
            counts as one row.
        plugins: import or file paths of tasks, adapters and models outside of fedlora and PEFT that a run may name.
        allow_client_gradients: whether gradients of the client's rows may be sent as they are, at the start of a run.
    """

    privacy: Literal["none", "record", "client"] = "none"
    max_epsilon: Annotated[float, Field(gt=0)] | None = None
    max_delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    trust_server_noise: bool = False
    max_rounds: Count | None = None
    max_local_steps: Count | None = None
    max_upload_bytes: Count | None = None
    max_download_bytes: Count | None = None
    min_rows: Count = 1
    runs: list[str] | None = None
    code: list[str] | None = None
    metrics: list[str] | None = None
    plugins: list[str] = Field(default_factory=list)
    allow_client_gradients: bool = False

    @classmethod
    def read(cls, path: Path) -> Policy:
        """Read a policy from a YAML file.

        Raises:
            InputError: there is no such file, it is no YAML mapping, or a setting is not known or not valid.
        """
        try:
            values = yaml.safe_load(path.read_text())
        except OSError:
            raise InputError(f"There is no policy {path}.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}.") from None
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise InputError(f"{path} must have lines such as 'max_rounds: 20'.")
        return validate(cls, values, "policy")

    def check_run(self, config: Config, fingerprint: str | None, code: str) -> None:
        """See whether a run may be joined, before anything of it is loaded.

        Args:
            config: as the server says it.
            fingerprint: of the terms of the run; ``None``: the server has not said them yet.
            code: hash of the installed code.

        Raises:
            PolicyError: it may not; names the setting of the run and that of the policy.
        """
        self._listed("runs", "the terms of the run are", fingerprint)
        self._listed("code", "the installed code is", code)
        for setting, path in plugins_of(config).items():
            if path not in self.plugins:
                raise PolicyError(f"{setting} = '{path}' is not among this client's policy.plugins")
        if config.adapter.get("basis") == "client_gradient":
            self.check_gradients()
        self._at_most("rounds", config.rounds, "max_rounds")
        if config.client.local_steps is not None:
            self._at_most("client.local_steps", config.client.local_steps, "max_local_steps")
        if config.privacy.name == "record" and self.metrics is not None and EPSILON not in self.metrics:
            raise PolicyError(
                f"privacy=record needs the metric '{EPSILON}', which this client's policy.metrics leaves out"
            )
        self._check_protection(config)

    def check_rows(self, config: Config, rows: int, elsewhere: tuple[float, float] = (0.0, 0.0)) -> None:
        """See whether a run may be joined with so many training rows.

        Args:
            config: of the run.
            rows: training rows of this client.
            elsewhere: epsilon and delta of this client's other runs.

        Raises:
            PolicyError: it may not.
        """
        if rows < self.min_rows:
            raise PolicyError(f"this client has fewer training rows than its policy.min_rows = {self.min_rows}")
        if self.max_local_steps is not None and config.client.local_steps is None:
            settings = config.client
            batches = math.ceil(rows / (settings.batch_size * settings.grad_accumulation))
            if settings.local_epochs * batches > self.max_local_steps:
                raise PolicyError(
                    f"client.local_epochs = {settings.local_epochs} makes more local steps of this client's rows than "
                    f"its policy.max_local_steps = {self.max_local_steps}: set client.local_steps"
                )
        if self._limited or config.privacy.name == "record":  # what cannot be kept at all is refused here, too
            self.check_cost(config, self.cost(config, rows, Used()), elsewhere)

    def check_training(
        self, config: Config, rows: int, used: Used, elsewhere: tuple[float, float], instructions: Mapping[str, Any]
    ) -> None:
        """See whether another round may be trained, and count it and what it costs in ``used``.

        Args:
            config: of the run.
            rows: training rows of this client.
            used: counters of the run; not changed if the round is refused.
            elsewhere: epsilon and delta of this client's other runs.
            instructions: of the server's message.

        Raises:
            PolicyError: it may not.
        """
        if self.max_rounds is not None and used.trainings >= self.max_rounds:
            raise PolicyError(f"this client has trained as often as its policy.max_rounds = {self.max_rounds} allows")
        after = Used(used.trainings + 1, own_noise=dict(used.own_noise))
        if self._by_own_noise(config):
            noise = own_noise(instructions)
            if noise == 0 and self._protected:
                raise PolicyError("the server asks for an update without this client's own noise on it")
            after.own_noise[repr(noise)] = after.own_noise.get(repr(noise), 0) + 1
        cost = UNBOUNDED
        if self._limited:
            cost = self.cost(config, rows, after)
            self.check_cost(config, cost, elsewhere)
        used.trainings, used.own_noise = after.trainings, after.own_noise
        if math.isfinite(cost.epsilon):
            used.epsilon, used.delta = max(used.epsilon, cost.epsilon), max(used.delta, cost.delta)

    def check_gradients(self) -> None:
        """See whether gradients of rows may be sent as they are.

        Raises:
            PolicyError: they may not.
        """
        if not self.allow_client_gradients:
            raise PolicyError(
                "adapter.basis=client_gradient sends gradients of this client's rows, and its "
                "policy.allow_client_gradients is false: use adapter.basis=gradient, weight or seeded"
            )

    def check_bytes(self, used: Used) -> None:
        """See whether no more bytes have travelled in a run than may.

        Raises:
            PolicyError: more have.
        """
        for field in ("upload", "download"):
            limit = getattr(self, f"max_{field}_bytes")
            if limit is not None and getattr(used, field) > limit:
                raise PolicyError(f"the run's {field}s are more than this client's policy.max_{field}_bytes = {limit}")

    def filtered(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Those of ``metrics`` that may be sent; a number of rows that may not becomes 1."""
        if self.metrics is None:
            return dict(metrics)
        kept = {name: value for name, value in metrics.items() if name in self.metrics}
        return {EXAMPLES: 1, **kept} if EXAMPLES in metrics else kept

    def cost(self, config: Config, rows: int, used: Used) -> Cost:
        """What a run costs this client, with the counters ``used``.

        Raises:
            PolicyError: the run leaves it open.
        """
        if config.privacy.name == "record":
            return record_cost(config, rows, used.trainings)
        if config.privacy.name == "none":
            return UNBOUNDED
        if self._by_own_noise(config):
            delta = config.privacy.delta or self.max_delta
            if delta is None:
                raise PolicyError("privacy.delta = null depends on who else takes part: a number is needed here")
            return own_cost(config, used, delta)
        return promised_cost(config, used.trainings)

    def check_cost(self, config: Config, cost: Cost, elsewhere: tuple[float, float]) -> None:
        """See whether a run that costs ``cost`` fits beside what other runs have cost.

        Raises:
            PolicyError: it does not.
        """
        privacy = config.privacy
        said = f"privacy={privacy.name} with privacy.epsilon = {privacy.epsilon} and privacy.noise_multiplier = "
        said += f"{privacy.noise_multiplier}"
        beside = " together with this client's other runs" if any(elsewhere) else ""
        if self.max_epsilon is not None and cost.epsilon + elsewhere[0] > self.max_epsilon:
            raise PolicyError(
                f"{said} may cost more{beside} than this client's policy.max_epsilon = {self.max_epsilon:g}"
            )
        if self.max_delta is not None and cost.delta + elsewhere[1] > self.max_delta:
            raise PolicyError(
                f"privacy.delta = {privacy.delta or 'null'} is more{beside} than this client's policy.max_delta = "
                f"{self.max_delta:g}"
            )

    @property
    def _protected(self) -> bool:
        """Whether a run must protect anything."""
        return self.privacy != "none" or self._limited

    @property
    def _limited(self) -> bool:
        return self.max_epsilon is not None or self.max_delta is not None

    def _by_own_noise(self, config: Config) -> bool:
        privacy = config.privacy
        return privacy.name == "client" and privacy.noise == "clients" and not self.trust_server_noise

    def _check_protection(self, config: Config) -> None:
        unit = config.privacy.name
        needed = self.privacy if self.privacy != "none" else "record" if self._protected else "none"
        if STRENGTH[unit] < STRENGTH[needed]:
            why = f"policy.privacy = {self.privacy}" if self.privacy != "none" else "policy.max_epsilon or max_delta"
            raise PolicyError(f"the run has privacy={unit}, and this client's {why} asks for privacy={needed}")
        if needed != "none" and config.privacy.noise_multiplier == 0:
            raise PolicyError(
                "privacy.noise_multiplier = 0 protects nothing, and this client's policy asks for privacy"
            )
        promised = unit == "client" and config.privacy.noise == "server"
        if self._protected and promised and not self.trust_server_noise:
            raise PolicyError(
                "privacy.noise=server is the server's promise, and this client's policy.trust_server_noise is false: "
                "use privacy.noise=clients"
            )

    def _listed(self, field: str, what: str, value: str | None) -> None:
        allowed = getattr(self, field)
        if allowed is not None and value is not None and value not in allowed:
            raise PolicyError(f"{what} '{value}', which is not among this client's policy.{field}")

    def _at_most(self, setting: str, value: int, field: str) -> None:
        limit = getattr(self, field)
        if limit is not None and value > limit:
            raise PolicyError(f"{setting} = {value} is more than this client's policy.{field} = {limit}")


def plugins_of(config: Config) -> dict[str, str]:
    """The code outside of fedlora and PEFT that a client would import for a run, by setting."""
    from fedlora.personal.encoders import is_encoder
    from fedlora.plugins import is_plugin_path

    found = {"task.name": str(config.task.get("name", ""))}
    peft = config.adapter.get("config")
    target = str(peft.get("_target_", "")) if isinstance(peft, dict) else ""
    if not (target.startswith("peft.") and ":" not in target):
        found["adapter.config._target_"] = target
    models = {f"backbone.models[{i}]": name for i, name in enumerate(config.backbone.models) if not is_encoder(name)}
    return {setting: path for setting, path in (found | models).items() if is_plugin_path(path)}
