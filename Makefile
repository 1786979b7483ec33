# make demo   from nothing to one-step text on a laptop: environment, data, flow, flow map, samples, loss curves
# make test   the tests, in the same environment
# make evidence   every model and baseline, measured: hours, may be stopped and repeated; see evidence.py
# These install into .venv first, once. ARGS adds settings to both training stages: make demo ARGS=--max_iters=30

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
OUT ?= out/pydocs
ARGS ?=

.PHONY: demo test evidence clean

demo:
	@date +%s > .demo_start
	@$(MAKE) --no-print-directory $(VENV)/ready
	$(RUN) data/pydocs/prepare.py
	$(RUN) train.py config/pydocs.py --out_dir=$(OUT) $(ARGS)
	$(RUN) distill.py config/distill_pydocs.py --out_dir=$(OUT) $(ARGS)
	$(RUN) plot.py --out_dir=$(OUT)
	$(RUN) sample.py --out_dir=$(OUT) --steps=1,2,4,8 --flow_steps=64
	@echo; echo "demo: $$(( $$(date +%s) - $$(cat .demo_start) )) s from nothing to text; loss curves in $(OUT)/loss.png"
	@rm .demo_start

test: $(VENV)/ready
	$(RUN) -m pytest -q -rs --durations=5 --numprocesses=auto --maxprocesses=4 --dist=loadfile

evidence: $(VENV)/ready
	$(RUN) evidence.py $(ARGS)

$(VENV)/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv out .hypothesis
