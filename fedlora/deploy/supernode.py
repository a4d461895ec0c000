"""Flower's SuperNode as a process that ends with ours: ``python -m fedlora.deploy.supernode``."""

from __future__ import annotations

from pathlib import Path

from fedlora.deploy.processes import Child, end_with_parent, free_port, new_secret
from fedlora.deploy.runtime import TaskQueue


class SuperNode:
    """The SuperNode of one client: talks to the server's SuperLink, and gives us the messages that arrive.

    It dials out to the server only. Its own port is open to this machine only, and to whoever knows the secret.
    """

    def __init__(self, server: str, folder: Path, root_certificates: Path | None, key: Path | None) -> None:
        """Start it.

        Args:
            server: ``host:port`` of the server.
            folder: for its log and its secret.
            root_certificates: that the server's certificate is checked with; ``None``: no encryption at all.
            key: the client's private key; ``None``: the server cannot know who this is.
        """
        port, secret_file = free_port(), folder / "supernode.secret"
        secret = new_secret(secret_file)
        arguments = ["--superlink", server, "--isolation", "process", "--host", "127.0.0.1", "--port", str(port)]
        arguments += ["--superexec-auth-secret-file", str(secret_file)]
        arguments += ["--insecure"] if root_certificates is None else ["--root-certificates", str(root_certificates)]
        arguments += [] if key is None else ["--auth-supernode-private-key", str(key)]
        self.root_certificates = root_certificates
        self.process = Child("Flower's SuperNode", "fedlora.deploy.supernode", arguments, folder / "supernode.log")
        self.tasks = TaskQueue(f"127.0.0.1:{port}", "flwr-clientapp", secret)

    @property
    def connected(self) -> bool:
        """Whether it has got in since it was last started."""
        return "SuperNode ID:" in self.process.said

    def why(self) -> str:
        """Why it is not connected, in words, as far as its log says."""
        log = self.process.said
        if "Failed to activate SuperNode" in log:
            return (
                "the server does not know this client's key, or another process with this key is connected (a server "
                "notices after a minute that one is gone)"
            )
        if "SSL/TLS" in log or "CERTIFICATE_VERIFY_FAILED" in log:
            return f"the server's certificate is not one that {self.root_certificates} has signed for that address"
        if self.process.running:
            return "nobody answers there, or only with encryption (or without) where this client asks without (or with)"
        return f"{self.process.name} has ended: {self.process.last_words()}"

    def stop(self) -> None:
        """End it."""
        self.tasks.close()
        self.process.stop()


if __name__ == "__main__":
    from flwr.supernode.cli import flower_supernode

    end_with_parent()
    flower_supernode()
