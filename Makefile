# Two commands are the whole set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test browser lint docs laws-full audit clean

demo: $(READY)
	$(BIN)/accel compare "a red house left of two pine trees under a starry sky" --seed 1 --out demo --overwrite

test: $(READY) browser
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not laws_full" --durations 20

# the pages are tested in Debian's Chromium: installed where there is none
browser:
	@$(PYTHON) tools/install_browser.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/write_docs.py --check

docs: $(READY)
	$(BIN)/python tools/write_docs.py

# goes on where the record stops, at the same code; the record is kept compressed
LAWS := tests/results/laws.jsonl
laws-full: $(READY)
	test ! -f $(LAWS).gz || gunzip --force $(LAWS).gz
	$(BIN)/python -m pytest -n 2 --dist worksteal -m laws_full --laws-record $(LAWS); \
	status=$$?; gzip --best --force $(LAWS); exit $$status

# known vulnerabilities of the pinned packages; needs the index that holds them, so CI leaves it out
audit: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --strict --no-deps --disable-pip -r constraints.txt

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,video,ui,cluster,tune,int8]"
	touch $@

clean:
	rm -rf $(VENV) demo
