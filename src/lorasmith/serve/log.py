"""One line of JSON a request. What was asked and answered is written only where the owner wants it so."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

logger = logging.getLogger("lorasmith.serve")


def write_line(event: str, **fields: Any) -> None:
    """Log ``fields`` under the name of what happened; None is left out."""
    logger.info(event, extra={"fields": {name: value for name, value in fields.items() if value is not None}})


class JsonLines(logging.Formatter):
    """{"time": ..., "level": ..., "event": ..., the fields of write_line}"""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["fault"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_to_stderr() -> None:
    """Write the server's lines, and uvicorn's warnings, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("lorasmith.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        log = logging.getLogger(name)
        log.handlers, log.level, log.propagate = [handler], level, False
