"""What a browser shows of the site: `python .ci/pages.py _docs` looks at every page below a folder.

Quarto's pages are looked at where they are rendered (docs.yml). Elsewhere checks.py gives this the same
notebooks as nbconvert renders them, in a frame with the site's own style sheet."""
import html, shutil, sys
from pathlib import Path

WIDTHS = 400, 1280  # pixels: a phone, a laptop
BROWSERS = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'
LOOK = r'''() => {
  const faults = [], main = document.querySelector('main') || document.body
  const short = e => e.textContent.trim().slice(0, 60)
  const shown = e => e.getClientRects().length > 0
  const wide = document.documentElement.scrollWidth - window.innerWidth
  if (wide > 1) faults.push(`the page is ${wide} pixels wider than the window`)
  const edge = main.getBoundingClientRect().right + 1
  for (const e of main.querySelectorAll('pre, table, img, svg'))
    if (shown(e) && !e.parentElement.closest('pre, table') && e.getBoundingClientRect().right > edge)
      faults.push(`${e.tagName} reaches over the right edge: ${short(e)}`)
  for (const e of main.querySelectorAll('td code, th code, td a, th a'))
    if (/^[\w.]+$/.test(short(e)) && e.getClientRects().length > 1)
      faults.push(`a table breaks the name ${short(e)}`)
  for (const e of main.querySelectorAll('img'))
    if (!(e.getAttribute('alt') || '').trim()) faults.push(`a picture has no alt text: ${e.src.slice(-60)}`)
  for (const e of main.querySelectorAll('pre')) {
    if (/^def |^```/.test(e.textContent.trim()) && /NoneType=None|\]\(https?:|->None:/.test(e.textContent))
      faults.push(`a signature is not Python: ${short(e)}`)
  }
  for (const e of main.querySelectorAll('h2, h3, h4'))
    if (/^_(?!_)|\._(?!_)/.test(short(e)) && !/\s/.test(short(e))) faults.push(`private: ${short(e)}`)
  return faults
}'''

def browser():
    "Path of a Chromium or Chrome; None where there is none"
    return next(filter(None, map(shutil.which, BROWSERS)), None)

def faults_of(files):
    "Lines that say what is wrong with pages, at both widths"
    from playwright.sync_api import sync_playwright
    out = []
    with sync_playwright() as p:
        chrome = p.chromium.launch(executable_path=browser(), args=['--no-sandbox'])
        page = chrome.new_page()
        page.route('http*://**', lambda route: route.abort())  # nothing beyond the pages themselves
        for f in files:
            page.goto(Path(f).resolve().as_uri(), wait_until='load')
            for width in WIDTHS:
                page.set_viewport_size(dict(width=width, height=900))
                out += [f'{Path(f).name} at {width}: {line}' for line in page.evaluate(LOOK)]
        chrome.close()
    return out

def framed(body, style, title):
    "A page that nbconvert made, in a frame like Quarto's: one column of text under a style sheet"
    frame = ('body {margin: 0; font: 17px/1.5 sans-serif} .input_area, .inner_cell {min-width: 0} '
             'main {max-width: 950px; margin: auto; padding: 0 12px} pre {margin: 0; font-size: 14px} '
             'td, th {padding: 4px 8px; text-align: left; vertical-align: top}')
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
            '<meta name="viewport" content="width=device-width">'
            f'<style>{frame}\n{style}</style><main>{body}</main></html>')

if __name__ == '__main__':
    pages = sorted(Path(sys.argv[1]).rglob('*.html'))
    if not pages or browser() is None:
        sys.exit(f'{len(pages)} pages below {sys.argv[1]}, browser: {browser()}')
    bad = faults_of(pages)
    print(*bad, f'{len(pages)} pages, {len(bad)} faults', sep='\n')
    sys.exit(bool(bad))
