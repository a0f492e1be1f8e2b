# Works on a fresh clone with Python >= 3.10 and make. Every target sets itself up.
PYTHON ?= python3
BIN := .venv/bin
NB ?=
PART ?=
ARGS ?=
PIP := -m pip install --disable-pip-version-check --no-compile
# One process for each core, where pip has one. Templates in some packages are no Python.
COMPILE := -m compileall -qq -j 0
LEARN := sed '/^\# -- privacy/,$$d' requirements.txt  # what notebooks 01 to 05 need

.PHONY: run lab test quick test-browser notebooks timings docs bench bench-full bench-peers setup setup-learn setup-dev format clean

run: $(if $(filter learn,$(PART)),setup-learn,setup)  ## execute the notebooks into runs/ and print the results
	$(BIN)/python tools/notebooks.py run $(if $(NB),--only $(NB)) $(if $(PART),--part $(PART)) $(ARGS)

lab: export OMP_NUM_THREADS ?= 1# as `make run` has it, see tools/notebooks.py
lab: setup  ## open JupyterLab on the notebooks (no news, no update checks)
	$(BIN)/jupyter lab --notebook-dir=notebooks --LabApp.news_url=None \
	  --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate $(ARGS)

test: setup-dev  ## every check: format, lint, tests, notebooks with small parameters
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest --durations=10 $(ARGS)

quick: setup-dev  ## the same, without notebooks, real servers and browser
	$(MAKE) test ARGS="-m 'not notebooks and not engines and not browser' $(ARGS)"

test-browser: setup-dev  ## site, report and JupyterLab with every notebook, in Chromium
	BROWSER_NOTEBOOKS=all $(BIN)/python -m pytest -m browser --durations=10 $(ARGS)

notebooks: setup-dev  ## rewrite the committed outputs of the notebooks
	$(BIN)/python tools/notebooks.py refresh $(if $(NB),--only $(NB)) $(ARGS)
	$(BIN)/python docs/pics/federation.py

timings: setup-dev  ## time and memory of the notebooks; fails above the time on a card
	$(BIN)/python tools/notebooks.py timings $(if $(NB),--only $(NB))

docs: setup-dev  ## README, guides and notebooks as one site: build/site/index.html
	rm -rf build/site
	$(BIN)/python -m sphinx -E -W --keep-going -n -q -c docs . build/site

bench: setup-dev  ## speed against a reference in the same run; fails above its bounds
	$(BIN)/python tests/benchmarks/run.py

bench-full: setup-dev  ## the same, longer, and rewrite docs/benchmarks.md from it
	$(BIN)/python tests/benchmarks/run.py --full

bench-peers: .venv-peers/.ready  ## whole runs of other frameworks (some GB on first use) and of ours
	.venv-peers/bin/python tests/benchmarks/peers/measure.py $(ARGS)

setup: .venv/.ready
setup-learn: $(if $(wildcard .venv/.ready),.venv/.ready,.venv/.ready-learn)
setup-dev: .venv/.ready-dev

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	  v >= (3, 10) or sys.exit(f"Python >= 3.10 is needed, {sys.executable} is {v.major}.{v.minor}; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/.ready: requirements.txt pyproject.toml | .venv/bin/python
	$(BIN)/python $(PIP) -r requirements.txt
	$(BIN)/python $(PIP) --no-deps -e .
	$(BIN)/python $(COMPILE) .venv/lib || true
	@touch $@

.venv/.ready-learn: requirements.txt pyproject.toml | .venv/bin/python
	$(LEARN) > .venv/learn.txt
	$(BIN)/python $(PIP) -r .venv/learn.txt
	$(BIN)/python $(PIP) --no-deps -e .
	$(BIN)/python $(COMPILE) .venv/lib || true
	@touch $@

# After the others, in two steps: all at once is more than the resolver of old pips can do.
.venv/.ready-dev: requirements-dev.txt .venv/.ready
	$(BIN)/python $(PIP) -r requirements-dev.txt
	$(BIN)/python $(COMPILE) .venv/lib || true
	@touch $@

# What the others need beside PyTorch and ours; the engines' packages do not go with theirs.
.venv-peers/.ready: requirements.txt tests/benchmarks/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	$(LEARN) > .venv-peers/learn.txt
	.venv-peers/bin/python $(PIP) \
	  -r .venv-peers/learn.txt -r tests/benchmarks/peers/requirements.txt
	.venv-peers/bin/python $(PIP) --no-deps -e .
	.venv-peers/bin/python $(COMPILE) .venv-peers/lib || true
	@touch $@

format: setup-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-peers runs build *.egg-info
