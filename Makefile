# make demo   from nothing to one-step text on a laptop: environment, data, flow, flow map, samples, loss curves
# make test   the tests, in the same environment
# Both install into .venv first, once. ARGS adds settings to both training stages: make demo ARGS=--max_iters=30

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
ARGS ?=

.PHONY: demo test clean

demo: $(VENV)/ready
	@date +%s > $(VENV)/start
	$(RUN) data/pydocs/prepare.py
	$(RUN) train.py config/pydocs.py $(ARGS)
	$(RUN) distill.py config/distill_pydocs.py $(ARGS)
	$(RUN) plot.py
	$(RUN) sample.py --num_samples=3 --model=fmlm --steps=1,2,4,8
	$(RUN) sample.py --num_samples=3 --model=flm --steps=64
	@echo "demo took $$(( $$(date +%s) - $$(cat $(VENV)/start) )) s after the installation; curves: out/pydocs/loss.png"

test: $(VENV)/ready
	$(RUN) -m pytest -q -rs --durations=5

$(VENV)/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv out
