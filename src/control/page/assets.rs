//! The files of the page. They are part of the program; nothing is read from disk.

use axum::Router;
use axum::http::header;
use axum::routing::get;

/// A file: its path, its type and its content.
struct Asset {
    path: &'static str,
    kind: &'static str,
    content: &'static str,
}

const SCRIPT: &str = "text/javascript; charset=utf-8";

const ASSETS: [Asset; 10] = [
    Asset { path: "/", kind: "text/html; charset=utf-8", content: include_str!("assets/index.html") },
    Asset { path: "/style.css", kind: "text/css; charset=utf-8", content: include_str!("assets/style.css") },
    Asset { path: "/icon.svg", kind: "image/svg+xml", content: include_str!("assets/icon.svg") },
    Asset { path: "/app.js", kind: SCRIPT, content: include_str!("assets/app.js") },
    Asset { path: "/detail.js", kind: SCRIPT, content: include_str!("assets/detail.js") },
    Asset { path: "/format.js", kind: SCRIPT, content: include_str!("assets/format.js") },
    Asset { path: "/map.js", kind: SCRIPT, content: include_str!("assets/map.js") },
    Asset { path: "/stats.js", kind: SCRIPT, content: include_str!("assets/stats.js") },
    Asset { path: "/summary.js", kind: SCRIPT, content: include_str!("assets/summary.js") },
    Asset { path: "/table.js", kind: SCRIPT, content: include_str!("assets/table.js") },
];

/// A route for each file.
pub(super) fn routes() -> Router {
    ASSETS.iter().fold(Router::new(), |router, asset| {
        // An upgrade may change the files, so a browser asks each time.
        let headers = [(header::CONTENT_TYPE, asset.kind), (header::CACHE_CONTROL, "no-cache")];
        router.route(asset.path, get(move || async move { (headers, asset.content) }))
    })
}

/// Paths and contents, for tests.
#[cfg(test)]
pub(super) fn all() -> Vec<(&'static str, &'static str)> {
    ASSETS.iter().map(|asset| (asset.path, asset.content)).collect()
}
