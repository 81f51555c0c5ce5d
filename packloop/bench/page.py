"""The HTML page around a report: its style, for light and dark, on a screen and on paper."""

from __future__ import annotations

from string import Template

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --text: #1b1f24; --back: #ffffff; --muted: #57606a; --grid: #d8dee4; --stripe: #f6f8fa; --link: #0550ae;
}
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --back: #14181d; --muted: #9aa4af; --grid: #38404a; --stripe: #1b2128; --link: #79b8ff; }
}
@media print {
  :root { --text: #000000; --back: #ffffff; --muted: #444444; --grid: #cccccc; --stripe: #ffffff; --link: #000000; }
}
body {
  margin: 2rem auto; padding: 0 1.25rem; max-width: 72rem;
  color: var(--text); background: var(--back); font: 16px/1.5 system-ui, "Segoe UI", Roboto, Arial, sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.2; }
h2 { font-size: 1.35rem; margin-top: 2.5rem; border-bottom: 1px solid var(--grid); padding-bottom: 0.2rem; }
h3 { font-size: 1.1rem; margin-top: 2rem; }
h4 { font-size: 1rem; margin-top: 1.5rem; }
p, li { max-width: 52rem; }
a { color: var(--link); }
code, pre { font-family: ui-monospace, Consolas, "DejaVu Sans Mono", monospace; font-size: 0.875em; }
pre { margin: 0.5rem 0 1rem; padding: 0.75rem; overflow-x: auto; }
pre { background: var(--stripe); border: 1px solid var(--grid); }
figure { margin: 1rem 0 1.5rem; overflow-x: auto; }
figure svg { display: block; width: 100%; height: auto; min-width: 38rem; max-width: 60rem; color: var(--text); }
figcaption { color: var(--muted); font-size: 0.9rem; max-width: 52rem; margin-top: 0.4rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid); }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; border-bottom-width: 2px; }
tbody tr:nth-child(even) { background: var(--stripe); }
td { max-width: 30rem; }
td:first-child { white-space: nowrap; }
td:not(.number) { min-width: 8rem; }
td:last-child:not(.number) { min-width: 14rem; }
.number { text-align: right; }
td.number { white-space: nowrap; }
summary { cursor: pointer; padding: 0.15rem 0; }
pre:target { border-color: var(--link); }
</style>
</head>
<body>
$body
</body>
</html>
""")
