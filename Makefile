# Two commands are all you need: `make train`, then `make chat`.
PYTHON ?= python3
VENV ?= .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif

.PHONY: train chat plot test quick lint clean

# A second `make train` says what to do next; pre_train.py itself would refuse, with an exit code that make reports.
ifneq ($(and $(wildcard out/TinySeek_Pre*.pkl),$(if $(ARGS),,none)),)
train:                        ## train a language model on your Python's standard library
	@echo "out/ holds a model already: make chat, or make train ARGS=--resume (or ARGS=--overwrite)"
else
train: $(VENV)/core.done
	$(BIN)/python train/pre_train.py $(ARGS)
endif

chat: $(VENV)/core.done       ## talk to the most advanced model in out/
	$(BIN)/python inference/chat.py

plot: $(VENV)/core.done       ## draw the curves of the last pre-training run again
	$(BIN)/python utils/plot.py

# Tests use one thread each, so as many processes as there are cores take turns at the files. ORACLES=1 installs
# large packages to compare with (requirements-oracles.txt); without them their tests are skipped by name.
test: $(VENV)/$(if $(ORACLES),oracles,test).done       ## all tests
	$(BIN)/python -m pytest -n auto --dist loadfile

quick: $(VENV)/test.done      ## the tests that take a moment
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

lint: $(VENV)/test.done       ## style and likely mistakes
	$(BIN)/python -m ruff check .

clean:                        ## remove the virtual environment; out/ stays
	rm -rf $(VENV)

$(VENV)/core.done: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'TinySeek needs Python 3.11 or newer: make PYTHON=python3.11 ...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/oracles.done: requirements-oracles.txt $(VENV)/test.done
	$(BIN)/python -m pip install --quiet -r requirements-oracles.txt
	@touch $@

$(VENV)/test.done: requirements-test.txt $(VENV)/core.done
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	@touch $@
