# make repro   run the whole pipeline          make test    run all tests
# make lab     open the notebooks              make smoke   ten episodes of your dataset through every notebook
# make check   what params.yaml, marks and corrections say, and what is wrong with them; runs nothing
# make lint    check style                     make lock    renew requirements.lock
# make pages   store anew what the notebooks say, against which the tests compare them (then: git diff tests/expected)
# make scorecard   train and measure the ablations of SARM (about half an hour)
# make experiment   policies with and without the weights, and every control, in the simulator (hours; resumable; needs OpenGL)
# make bench   speed beside LeRobot's own code, memory, what half precision changes, whether compiling pays (about an hour)
# make demo    record the demo dataset again (needs OpenGL)
# Each builds what it needs. PYTHON=/path/to/python3.12 chooses the interpreter.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: env data repro test pages lab check smoke lint lock demo scorecard bench experiment clean

VENV := .venv
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
# Nothing here phones home or waits for a network that is not there.
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

repro: data
	dvc repro
	@echo "Reports: outputs/reports/*.html"

test: data
	python -m pytest -n auto --maxprocesses 4 --dist loadscope

pages: env
	python -m tests.pages

lab: data
	jupyter lab notebooks

check: data
	python -m sarm_lib.pipeline check

smoke: data
	python -m sarm_lib.pipeline smoke

scorecard: data
	python -m benchmarks.scorecard

lint: env
	ruff check .
	ruff format --check sarm_lib demo tests
	ruff format --check --line-length 96 notebooks

bench: repro
	python -m benchmarks.speed
	python -m benchmarks.memory
	python -m benchmarks.precision
	python -m benchmarks.compile

experiment: repro
	python -m benchmarks.experiment --begin

demo: env
	python -m demo.record data/demo/assembly
	python -m demo.encoder data/demo/encoder
	@echo "Recorded. To keep it: dvc add data && dvc push"

lock:
	@test -x "$(BIN)/uv" || $(MAKE) env
	uv pip compile pyproject.toml --extra sim --extra dev --universal --python-version 3.12 \
	  --generate-hashes --no-emit-index-url --upgrade --quiet -o requirements.lock

# Pulled again when data.dvc has changed, when a pull was interrupted and when the data is gone.
PULLED := $(VENV)/.pulled
ifeq ($(wildcard data/demo/assembly/meta/info.json),)
.PHONY: $(PULLED)
endif

data: $(PULLED)

$(PULLED): data.dvc | env
	dvc pull -q data.dvc
	@touch $@

env: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml .ci/find-python
	python312=$$(bash .ci/find-python) && "$$python312" -m venv --clear $(VENV)
	sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > $(VENV)/uv.txt
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $(VENV)/uv.txt
	"$(BIN)/uv" pip sync --quiet --python "$(BIN)/python" --require-hashes requirements.lock
	"$(BIN)/uv" pip install --quiet --python "$(BIN)/python" --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf $(VENV) outputs/scratch outputs/work
