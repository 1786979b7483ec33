# make demo         from nothing to one-step text on a laptop: environment, data, flow, flow map
# make walkthrough  the whole method in one file of 200 lines, three minutes on two cores
# make test         ruff and the tests
# make evidence     every model and baseline, measured: hours; stop and repeat it as you like
# make figures      the pictures of the README, from out/palindromes
# make gpu          what one GPU does: tests, benchmark, profile; five minutes
# All install into .venv first, once. ARGS adds settings: make demo ARGS=--max_iters=30

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
OUT ?= out/pydocs
ARGS ?=

.PHONY: demo walkthrough test evidence figures gpu clean

demo:
	@date +%s > .demo_start
	@$(MAKE) --no-print-directory $(VENV)/ready
	$(RUN) data/pydocs/prepare.py
	$(RUN) train.py config/pydocs.py --out_dir=$(OUT) $(ARGS)
	$(RUN) distill.py config/distill_pydocs.py --out_dir=$(OUT) $(ARGS)
	$(RUN) eval/plot.py --out_dir=$(OUT)
	$(RUN) sample.py --out_dir=$(OUT) --steps=1,2,4,8 --flow_steps=64
	@echo; echo "demo: $$(( $$(date +%s) - $$(cat .demo_start) )) s from nothing to text; losses in $(OUT)/loss.png"
	@rm .demo_start

walkthrough: $(VENV)/ready
	$(RUN) docs/walkthrough.py

test: $(VENV)/ready
	$(RUN) -m ruff check
	$(RUN) -m pytest -q -rs --durations=5 --numprocesses=auto --maxprocesses=4 --dist=loadfile \
		--no-loadscope-reorder

evidence: $(VENV)/ready
	$(RUN) eval/evidence.py $(ARGS)

figures: $(VENV)/ready
	$(RUN) docs/figures.py $(ARGS)

gpu: $(VENV)/ready
	PYTHON=$(RUN) bash eval/gpu.sh

$(VENV)/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv out .hypothesis .ruff_cache
