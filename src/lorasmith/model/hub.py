"""The Hub's side of an adapter: pull one by its name, and say its refusals with the way out.

    owner/name, with adapter_config.json in it  ->  a snapshot folder here: the adapter, and run.json if it has one

Only the files of an adapter are fetched, at one commit; a repository without one is a whole model (base.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lorasmith.data.sources import HUB_ID
from lorasmith.errors import HubError, first_line
from lorasmith.files import CHECKSUMS
from lorasmith.model.adapter_folder import CONFIG, WEIGHTS
from lorasmith.model.quiet import quiet_loading

_WANTED = [CONFIG, WEIGHTS, CHECKSUMS, "run.json", "tokenizer*", "special_tokens_map.json", "chat_template*"]


def reads_as_hub_id(source: str) -> bool:
    """Say whether ``source`` is owner/name and no place on this machine; runs/name is a run in the wrong folder."""
    owner, slash, _ = source.partition("/")
    is_id = bool(slash) and bool(HUB_ID.fullmatch(source))
    return is_id and owner != "runs" and not Path(source).parent.exists()


def pull_adapter(id: str, tell: Callable[[str], None]) -> Path | None:
    """Return the adapter ``id`` as a folder on this machine, or None where that is a whole model or unknown.

    Raises:
        HubError: it is there, and the Hub does not give it, or breaks off.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    with quiet_loading(), hub_faults(id):
        try:
            hf_hub_download(id, CONFIG)
        except (EntryNotFoundError, RepositoryNotFoundError):  # also: offline, and no copy here
            return None
        tell(f"Fetching the adapter {id} from the Hub (once; later starts use the copy on this machine) ...")
        return Path(snapshot_download(id, allow_patterns=_WANTED))


@contextmanager
def hub_faults(id: str) -> Iterator[None]:
    """Raise HubError, with the way out, for whatever huggingface_hub raises about ``id`` inside the block."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        FileMetadataError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RevisionResolutionError,
    )

    try:
        yield
    except HFValidationError as fault:
        raise HubError(f"{id} is no name of the Hub: it is OWNER/NAME, such as anna/faq. {fault}") from fault
    except LocalTokenNotFoundError as fault:
        raise HubError(f"{_LOGIN} to reach {id}.") from fault
    except OfflineModeIsEnabled as fault:
        raise HubError("HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it to go on.") from fault
    except HfHubHTTPError as fault:
        raise HubError(_said(id, fault.response.status_code, fault.server_message)) from fault
    except (
        HTTPError,
        ConnectionError,
        EntryNotFoundError,  # a file that neither the Hub nor this machine could give
        FileMetadataError,
        RevisionResolutionError,
    ) as fault:
        raise HubError(_broken(id, fault)) from fault
    except ValueError as fault:  # its own checks, and the Hub's of a card
        raise HubError(f"The Hub does not take it for {id}: {' '.join(str(fault).split())}") from fault
    except RuntimeError as fault:  # of a file's upload; the cause says why
        cause = fault.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise HubError(_said(id, cause.response.status_code, cause.server_message)) from fault
        raise HubError(_broken(id, cause or fault)) from fault


_LOGIN = "You are not logged in to the Hub, or your token is no longer valid. Run: lorasmith login,"


def _said(id: str, status: int, message: str | None) -> str:
    said = f" The Hub says: {message.strip()}" if message else ""
    match status:
        case 401:
            return f"{_LOGIN} to reach {id}.{said}"
        case 403:
            return (
                f"The Hub forbids it for {id}: your token may not do that there. Name a place of your own, or log in "
                f"with a token that may write: lorasmith login.{said}"
            )
        case 404:
            return f"There is no {id} on the Hub, or it is private and you may not see it.{said}"
        case 409 | 412:
            return f"Something else changed {id} on the Hub at the same moment. Look at it, then push again.{said}"
        case 413:
            return f"The Hub takes no file as large as one of {id}.{said}"
    return f"The Hub fails for {id} (status {status}). Try again later: what arrived is not sent again.{said}"


def _broken(id: str, fault: BaseException) -> str:
    return (
        f"The connection to the Hub broke off for {id} ({first_line(fault)}). No file there has changed. "
        "Try again: files that arrived whole are not sent again."
    )
