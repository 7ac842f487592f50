# Two commands matter: `make book` (the site in _build/html) and `make test` (everything that must hold).
# Paths are relative to this folder, which may have spaces in its name.

SHELL  := /bin/sh
PYTHON ?= python3
# The CPU build is enough.  On Linux the plain name downloads gigabytes of CUDA; this one does not:
#   make book TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH  ?= torch==2.13.0
ONLY   ?=
ALL    ?=
SEED   ?=
SECONDS ?= 600
PORT   ?= 8000
JOBS   ?= 2
# REHEARSE=0 stores a lesson's run without rehearsing the rounding
REHEARSE ?= 1

BIN    := .venv/bin
STAMP  := .venv/.installed
BUILD  := $(BIN)/jupyter-book build . --toc "$(CURDIR)/book/_toc.yml" -W --keep-going
# a backend chosen in the environment would make the notebooks' figures vanish
unexport MPLBACKEND

.PHONY: help book serve lessons rehearse text notebooks pictures records test unit mutants attack check-lessons lint format bench clean distclean env
.DEFAULT_GOAL := help

help:
	@echo "make book       the site, in _build/html, from the stored outputs"
	@echo "make serve      the same, opened by a local server on port $(PORT)"
	@echo "make test       everything that must hold"
	@echo "make lessons    run the lessons and write their notebooks (ONLY=01-width-bounds for one)"
	@echo "                and rehearse them before they are stored (REHEARSE=0: without)"
	@echo "make rehearse   run the lessons with their last bits moved: does another processor print the same? (ONLY=...)"
	@echo "make text       write the notebooks anew after a change of prose, with the outputs they have"
	@echo "make notebooks  the texts as working notebooks in _build/notebooks; changes go both ways"
	@echo "make pictures   the pictures of the home page and of the README"
	@echo "make records    take the stored records of long runs anew (ONLY=minimum-norm-figure-1 for one)"
	@echo "make unit       only the tests of the package; make lint, make format: ruff, jupytext"
	@echo "make check-lessons   nbval on the lessons in this environment (ONLY=... for one)"
	@echo "make mutants    do the tests notice a changed sign?  (ONLY=rigor/balls for one module, ALL=1 for every mutant, SEED=)"
	@echo "make attack     look for a false certificate for SECONDS=600  (ONLY=arithmetic, certificates or calls; SEED=)"
	@echo "make bench      the benchmarks; make clean: forget what was built; make distclean: .venv too"

# --- the environment: made once, and again only when what it is made from changes

env: $(STAMP)

$(STAMP): pyproject.toml book/constraints.txt
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "Python 3.11, 3.12 or 3.13 is needed (make PYTHON=...); found %d.%d" % v)'
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -c book/constraints.txt setuptools wheel
	$(BIN)/python -m pip install -q -c book/constraints.txt --no-build-isolation -e '.[book,test,certify,scale]'
	@touch $(STAMP)

# --- the site

book: $(STAMP)
	@mkdir -p _build
	@rm -rf _build/html _build/.doctrees _build/jupyter_execute
	@$(BUILD) > _build/book.log 2>&1 || { cat _build/book.log; exit 1; }
	@if grep -q "WARNING" _build/book.log; then cat _build/book.log; exit 1; fi
	@echo "The site is ready. Open this file in a browser, or run make serve:"
	@echo "  $(CURDIR)/_build/html/index.html"

serve: book
	@echo "http://localhost:$(PORT)/ (stop with Ctrl-C)"
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

lessons: $(STAMP)
	$(BIN)/python book/_tools/notebooks.py run $(if $(filter 0,$(REHEARSE)),--no-rehearsal) $(ONLY)

rehearse: $(STAMP)
	$(BIN)/python book/_tools/notebooks.py rehearse $(ONLY)

text: $(STAMP)
	$(BIN)/python book/_tools/notebooks.py text $(ONLY)

notebooks: $(STAMP)
	$(BIN)/jupytext --sync lessons/*.md

pictures: $(STAMP)
	PYTHONPATH=. $(BIN)/python book/_tools/pictures.py

records: $(STAMP)
	PYTHONPATH=. $(BIN)/python book/_tools/take_records.py $(ONLY)

# --- the tests

test: $(STAMP) lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

unit: $(STAMP)
	$(BIN)/python -m pytest -m "not pipeline and not slow"

mutants: $(STAMP)
	$(BIN)/python -c 'import cosmic_ray' 2>/dev/null || $(BIN)/python -m pip install -q -c book/constraints.txt -e '.[mutants]' --no-build-isolation
	$(BIN)/python tests/mutants.py $(ONLY) $(if $(ALL),--all) $(if $(SEED),--seed $(SEED))

attack: $(STAMP)
	PYTHONPATH=.:tests $(BIN)/python -m attack --seconds $(SECONDS) --only '$(ONLY)' $(if $(SEED),--seed $(SEED))

check-lessons: $(STAMP)
	$(BIN)/python book/_tools/notebooks.py check $(ONLY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -p no:cacheprovider --nbval --nbval-current-env --nbval-cell-timeout=300 --nbval-sanitize-with=tests/nbval_sanitize.cfg \
	  $(if $(ONLY),lessons/$(ONLY).ipynb,lessons)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/jupytext -q --to ipynb --test-strict lessons/*.md || { echo "make format writes the texts in jupytext's form"; exit 1; }

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@# through the form of a notebook, which orders the options; `make notebooks` goes by time stamps, so what does not
	@# change keeps its own
	@mkdir -p _build; for text in lessons/*.md; do cp -p "$$text" _build/before.md || exit 1; \
	  $(BIN)/jupytext -q --to md:myst --pipe cat --pipe-fmt ipynb "$$text" || exit 1; \
	  cmp -s _build/before.md "$$text" && cp -p _build/before.md "$$text"; done; rm -f _build/before.md

bench: $(STAMP)
	@for script in benchmarks/[a-z]*.py; do case "$$script" in *_gpu.py) continue;; esac; \
	  echo "$$script"; $(BIN)/python "$$script" || exit 1; done

# the working notebooks may hold what was never synced
clean:
	test ! -d _build || find _build -mindepth 1 -maxdepth 1 ! -name notebooks -exec rm -rf {} +
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis wide_enough.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
