"""Does in a browser what a user would, step by step: see test_browser.py.

Runs in an environment of its own, with Playwright, on Debian's Chromium.
"""

import json
import sys

from playwright.sync_api import expect, sync_playwright

base, folder, steps = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.set_default_timeout(30_000)
    expect.set_options(timeout=30_000)
    for number, (do, what) in enumerate(steps):
        print(do, what, flush=True)
        try:
            if do == "go to":
                page.goto(f"{base}{what}")
            elif do == "click":
                page.get_by_text(what, exact=True).locator("visible=true").first.click()
            elif do == "start":  # leaving at once would undo the click that starts a flow run
                status = 503
                while status == 503:  # the database is busy: Prefect's client would ask again, too
                    page.get_by_role("button", name="Run").last.click()
                    with page.expect_response("**/create_flow_run") as answer:
                        page.get_by_text(what, exact=True).locator("visible=true").first.click()
                    status = answer.value.status
                assert answer.value.ok, status
            elif do == "press":
                page.get_by_role("button", name=what).last.click()
            elif do == "open menu":
                page.locator("button[aria-haspopup=menu]").first.click()
            elif do == "see":
                expect(page.get_by_text(what).locator("visible=true").first).to_be_visible()
            elif do == "see picture":
                picture = page.get_by_role("img", name=what).first
                expect(picture).to_be_visible()
                assert picture.evaluate("picture => picture.naturalWidth") > 0
        except BaseException:
            page.screenshot(path=f"{folder}/{number}-failed.png")
            print(page.inner_text("body"))
            raise
    browser.close()
