# The README's commands. Each does the set-up it needs; see scripts/setup for where it installs.
.PHONY: help quickstart test check

OUT ?= runs/quickstart

help:  ## Say what there is.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

quickstart:  ## Train, measure and report a small model on the generated corpus (OUT=folder).
	@python=$$(scripts/setup all sklearn,laspy,trimesh) && "$$(dirname "$$python")/polymodal" quickstart --out "$(OUT)"

test:  ## Run every test.
	@python=$$(scripts/setup dev pytest,xdist,transformers,peft) && scripts/references "$$python" && PM_PYTHON="$$python" scripts/test

check:  ## Format, lint, types, import contract, sizes.
	@python=$$(scripts/setup dev ruff,mypy,importlinter) && PM_PYTHON="$$python" scripts/check
