"""What every part of a job file is: a mapping with known keys."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a job; an unknown key is refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True)
