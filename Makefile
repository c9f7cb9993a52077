# Needs python >= 3.11 and make; each target builds .venv the first time.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
READY  := .venv/.ready

.PHONY: demo test check lint slow setup clean

# --resume: a demo that was stopped goes on, and one that is done shows its table again.
demo: $(READY)
	.venv/bin/regard compare multi_head luna efficient performer --task source --seeds 3 --budget 200steps --out runs/demo/source --resume
	.venv/bin/regard compare se eca cbam gc --task digits --seeds 3 --budget 60steps --out runs/demo/digits --resume

test: $(READY)
	.venv/bin/pytest -q -n auto -m "not slow"

slow: $(READY)
	.venv/bin/pytest -q -m slow

lint: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	.venv/bin/lint-imports

check: lint test

setup: $(READY)

# torch goes in first and alone: every later requirement is then satisfied by it, and nothing can pull a CUDA build.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check $(TORCH)
	.venv/bin/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
