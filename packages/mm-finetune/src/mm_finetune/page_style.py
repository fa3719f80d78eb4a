"""How a report looks: one style sheet for wide and narrow screens, light and dark, and paper."""

# Even if a text slipped through unescaped: no script, no request.
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #667085; --line: #e4e7ec; --accent: #0b6e69; --wrong: #a8321f;
  --paper: #fff; --ground: #f6f7f8; --track: #eef0f2; --old: #98a2b3; --faint: #c4cad3 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa4b2; --line: #2f3641; --accent: #4fb8ae;
  --wrong: #ef8a73; --paper: #1a1f27; --ground: #12161c; --track: #2a313b; --old: #667085; --faint: #4a5462 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1rem 4rem; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem }
p { margin: .3rem 0; max-width: 44rem }
.soft { color: var(--soft) }
.small { font-size: .875rem }
.panel { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 1.1rem 1.25rem }
.columns { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)) }
.curves { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 430px), 1fr)) }
.panel + .curves, .curves + .panel { margin-top: 1rem }
.headline { display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem 1rem; margin-bottom: .9rem }
.headline b { font-size: 3rem; line-height: 1.1; letter-spacing: -.02em; font-variant-numeric: tabular-nums }
.headline .old { color: var(--soft); font-weight: 500 }
.headline .new { color: var(--accent) }
.group { padding: .75rem 0; border-top: 1px solid var(--line) }
.group h3 { font-size: 1rem; font-weight: 600; margin: 0 0 .3rem }
.bar { display: grid; grid-template-columns: 4.6rem 1fr 9.5rem; gap: .6rem; align-items: center; font-size: .875rem }
.track { height: .6rem; border-radius: .3rem; background: var(--track); overflow: hidden }
.track i { display: block; height: 100%; background: var(--old) }
.track i.new { background: var(--accent) }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
figure { margin: 0; min-width: 0 }
figure svg { width: 100%; height: auto; display: block; overflow: visible }
figure svg text { font-family: inherit !important }
figcaption { font-weight: 600; margin-bottom: .4rem } figcaption .soft { font-weight: 400; font-size: .875rem }
.scroll { overflow-x: auto } .scroll table { min-width: 34rem }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .22rem .75rem .22rem 0; vertical-align: top; border-top: 1px solid var(--line) }
th { color: var(--soft); font-weight: 400 } thead th { border: 0; white-space: nowrap } table.settings th { width: 52% }
caption { text-align: left; font-weight: 600; padding-bottom: .25rem }
h2 + p { margin: -.4rem 0 .75rem }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: .8rem; margin: 0 }
dl.facts dt, .said dt { color: var(--soft); font-size: .8125rem }
dl.facts dd { margin: 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums }
summary { cursor: pointer } .fold { margin-top: 1rem } .fold > summary { color: var(--soft); margin-bottom: .75rem }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(172px, 1fr));
  list-style: none; margin: 0; padding: 0 }
.card { background: var(--paper); border: 1px solid var(--line); border-top: 4px solid var(--accent);
  border-radius: 10px; padding: .7rem; font-size: .875rem; min-width: 0 }
.card.wrong { border-top: 4px dashed var(--wrong) }
.card img, .none { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--track); border-radius: 6px;
  display: block } .none { display: grid; place-content: center; color: var(--soft) }
.card .question { margin: .55rem 0 .35rem; line-height: 1.35 }
.said { display: grid; grid-template-columns: minmax(3.1rem, max-content) 1fr; gap: .1rem .4rem; margin: 0 }
.said dd { margin: 0; min-width: 0 } dd details, dd summary { display: inline }
.verdict { margin: 0 0 .45rem; font-weight: 600; font-size: .8125rem; color: var(--accent) }
.card.wrong .verdict, .said .wrong { color: var(--wrong) } .said .right { color: var(--accent) }
.attached img, .attached video { width: 100%; display: block; image-rendering: pixelated; border-radius: 6px }
@media (max-width: 480px) { .bar { grid-template-columns: 4.2rem 1fr 8.2rem; gap: .4rem }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)) } .headline b { font-size: 2.5rem }
  .panel { padding: .9rem } }
@media print { body { background: #fff } .card, .panel { break-inside: avoid } }
"""
