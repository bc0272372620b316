"""Keep the loading noise of transformers and the Hub off the user's screen."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence progress bars, advice and deprecation notices of the model libraries inside the block.

    Errors still raise; the libraries' settings are put back on leaving. Not for use from several threads.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    verbosity, showed_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_showed_bars, hub_verbosity = not are_progress_bars_disabled(), hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # it tells of each attempt without a network
    logging.disable_progress_bar()  # disables the Hub's bars as well
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # transformers warns itself about its own names; a user can mend nothing there.
            warnings.filterwarnings(
                "ignore", category=FutureWarning, module=r"(transformers|huggingface_hub|torch|peft)"
            )
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # merge unties
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # load_adapter raises
            # An adapter of a newer PEFT: what it sets beyond this one's settings was refused before.
            warnings.filterwarnings("ignore", message="Unexpected keyword arguments")
            # AdaLoRA takes some layers' rank to nothing.
            warnings.filterwarnings("ignore", message=".*have invalid shape")
            # ... and PEFT, which reads the pattern of its ranks elsewhere, does not know it here.
            warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if showed_bars:
            logging.enable_progress_bar()
        if hub_showed_bars:
            enable_progress_bars()
