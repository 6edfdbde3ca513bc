#!/usr/bin/env bash
# Record docs/repl-session.md: a chat with the exported demo model in a real terminal (tmux), typed by this script.
# Needs tmux, and a bundle of the demo model in the workspace (make demo, then G4_HOME=build/demo tools/record_repl_session.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
export G4_HOME="${G4_HOME:-$PWD/build/demo}"
g4="${G4:-.venv/bin/g4}"
page=docs/repl-session.md
session="g4-record-$$"

tmux new-session -d -s "$session" -x 80 -y 100 "env PS1='$ ' HISTFILE= bash --norc --noprofile"
trap 'tmux kill-session -t "$session" 2>/dev/null || true' EXIT

screen() { tmux capture-pane -p -t "$session"; }

# wait_for N: until N prompts of the chat are on the screen and the last one is empty.
wait_for() {
  for _ in $(seq 600); do
    [ "$(screen | grep -c '^\[ctx [0-9]*/[0-9]*\] >')" -ge "$1" ] && screen | grep '^\[ctx' | tail -1 | grep -q '> *$' && return
    sleep 0.1
  done
  echo "error: the chat did not answer" >&2
  screen >&2
  exit 1
}

say() { tmux send-keys -t "$session" -l "$1"; tmux send-keys -t "$session" Enter; }

say "alias g4=$g4; clear"
sleep 1
say "g4 run --temperature 0"
turn=1
wait_for "$turn"
while IFS= read -r line; do
  say "$line"
  turn=$((turn + 1))
  wait_for "$turn"
done <<'LINES'
What is the capital of France?
My bag is red.
I left my keys in the kitchen.
What color is my bag?
Where are my keys?
/think on
What is 17 + 25?
/stats
/quit
/save /tmp/g4-chat.json
/clear
/load /tmp/g4-chat.json
LINES
tmux send-keys -t "$session" C-d
sleep 1

{
  echo '# A chat in the terminal'
  echo
  echo 'Recorded in tmux by `tools/record_repl_session.sh` with the demo model, exported by `make demo`.'
  echo
  echo '```text'
  screen | sed -e "s#$G4_HOME#build/demo#g" -e "s#$PWD/##g" -e 's/[[:space:]]*$//' | sed -e :a -e '/^\n*$/{$d;N;ba' -e '}'
  echo '```'
} > "$page.partial"
mv "$page.partial" "$page"
rm -f /tmp/g4-chat.json
