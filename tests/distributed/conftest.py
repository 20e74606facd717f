"""What pytest need not look at for doctests: what ranks alone import, as it takes long."""

from __future__ import annotations

collect_ignore = ["lightning_parts.py", "resume.py", "resume_pipeline.py", "trainer_parts.py"]
