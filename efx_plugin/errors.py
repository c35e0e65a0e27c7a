"""The errors a user meets: one sentence that names the culprit and the remedy."""


class EfxError(Exception):
    """A request that cannot be carried out; the message is one sentence fit to be shown as it is."""


class UsageError(EfxError):
    """A request that was put wrongly: a path, a name or a value that cannot be meant. The shell gets exit code 2."""


class SparseCheckpointError(EfxError):
    """A sparse checkpoint that is incomplete, corrupt or inconsistent; the message names file and tensor."""


def one_line(error: BaseException) -> str:
    """The first sentence of an error's message, without a full stop."""
    message = " ".join((str(error).strip() or type(error).__name__).split())
    return message.split(". ")[0].rstrip(".")
