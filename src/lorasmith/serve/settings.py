"""What a server may be told; every limit has a number here. Needs no torch."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


class ServeSettings(BaseModel):
    """How requests are taken and answered. Tokens count what the keys and values of prompts and answers need."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="Address to listen on; 127.0.0.1: this machine only.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0: any free one.")
    max_rows: int = Field(default=16, ge=1, description="Answers written at once.")
    max_waiting: int = Field(
        default=256, ge=1, description="Answers that may wait; beyond, requests get status 429."
    )
    cache_tokens: int = Field(
        default=16_384, ge=64, description="Tokens held for the answers written at once; decides the memory."
    )
    kept_tokens: int = Field(
        default=8_192,
        ge=0,
        description="Tokens kept of finished ones, for prompts that begin alike; 0: none.",
    )
    chunk_tokens: int = Field(
        default=512, ge=8, description="Prompt tokens read between two tokens of the others."
    )
    max_prompt_tokens: int = Field(default=8_192, ge=1, description="Longest prompt, template included.")
    max_answer_tokens: int = Field(default=2_048, ge=1, description="Longest answer that may be asked for.")
    max_choices: int = Field(default=8, ge=1, description="Most answers to one request (n).")
    max_request_bytes: int = Field(default=1 << 20, ge=1024, description="Largest request.")
    drain_seconds: int = Field(
        default=30, ge=0, description="After SIGTERM, how long answers under way may take."
    )
    override_system: bool = Field(
        default=False, description="Let requests replace the system prompt that a run was trained with."
    )
    adapter_folders: tuple[Path, ...] = Field(
        default=(), description="Folders that adapters may be loaded from while serving; none: not allowed."
    )
    max_models: int = Field(default=64, ge=1, description="Most models served at once, the base among them.")
    log_contents: bool = Field(default=False, description="Write questions and answers into the log.")

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host in LOCAL_HOSTS
