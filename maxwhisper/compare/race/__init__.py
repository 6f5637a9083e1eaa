"""`maxwhisper race`: what `maxwhisper compare` has measured, as a race.

The engines have run one after the other; `lanes` puts their transcripts side by side, each word with the time at which
it was there. `terminal` replays that at true speed, `page` as a file for a browser.
"""
