// Keeps the page for when there is no network. An address with ?HASH never changes; of others the
// newest is asked for.
self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", event => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", event => event.respondWith(answer(event)));

async function answer(event) {
  const kept = await caches.open("swiftaudio"), { request } = event;
  const found = await kept.match(request);
  if (found && /\?[0-9a-f]{16}$/.test(request.url)) return found;
  try {
    const got = await fetch(request);
    if (got.ok && request.method === "GET") {
      await kept.delete(request, { ignoreSearch: true });
      event.waitUntil(kept.put(request, got.clone()));
    }
    return got;
  } catch (error) {
    if (found) return found;
    throw error;
  }
}
