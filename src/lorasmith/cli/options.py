"""Options that belong to another use of a command than the one that was asked for."""

from lorasmith.errors import SettingsError


def refuse_ignored(beside: str, **options: object) -> None:
    """Refuse those of ``options`` that were given, since ``beside`` would ignore them; None, False, "auto": not given.

    Raises:
        SettingsError: names them.
    """
    given = [
        f"--{name.replace('_', '-')}" for name, value in options.items() if value not in (None, False, "auto")
    ]
    if given:
        raise SettingsError(
            f"{' and '.join(given)} would be ignored beside {beside}. Leave {'it' if len(given) == 1 else 'them'} out."
        )
