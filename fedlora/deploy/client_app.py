"""The ClientApp for plain ``flower-supernode``: the same client, in the new process that Flower starts for a message.

Its settings are in the node's configuration: ``--node-config "client-id='site-a' data='rows.csv' home='site-a/'"``.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
@app.query()
@app.evaluate()
def handle(message: Message, context: Context) -> Message:
    """Answer ``message`` as the client that the node's configuration describes."""
    from pathlib import Path

    from fedlora.deploy.client import DeployedClient, Home
    from fedlora.deploy.policy import Policy

    own = {key.removeprefix("data."): str(value) for key, value in context.node_config.items()}
    known = {"client-id", "home", "data", "backbone", "policy"}
    columns: dict[str, str | None] = {key: value for key, value in own.items() if key not in known}
    policy = Policy.read(Path(own["policy"])) if "policy" in own else Policy()
    home = Home(Path(own["home"]), own["client-id"], own["data"], columns, own.get("backbone"), policy)
    return DeployedClient(home).handle(message)
