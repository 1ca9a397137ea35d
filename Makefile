# make demo: compose three bundled pictures with the bundled model into demo.png and demo-sheet.png. make test: everything CI runs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test lint clean

demo: $(VENV)/pipeline.stamp
	$(BIN)/unipic compose pictures/man-office-worker.png pictures/tent.png pictures/desert.png \
	  --prompt "Place the tent from image 2 right of the man office worker from image 1, in the desert of image 3." \
	  --lora unipic_core/models/unipic-nano/loras/unipic-nano-few-step.safetensors \
	  --seed 15 --out demo.png --sheet demo-sheet.png --overwrite

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.nodes.check_types

$(VENV)/pipeline.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[pipeline]"
	touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) demo.png demo-sheet.png
