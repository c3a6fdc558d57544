// Node's ws, answering the envelope of the protocol.

import { WebSocketServer } from "ws";

const [host, port] = process.argv[2].split(":");
const server = new WebSocketServer({ host, port: Number(port), path: "/web", perMessageDeflate: false });

server.on("connection", (socket) => {
  socket.on("error", () => {});
  socket.on("message", (text) => {
    const { type, pkg_id, req_id, data } = JSON.parse(text);
    const answer = type === "auth" ? { type: "auth_ok" } : { pkg_id, req_id, status_code: 0, meta: null, data };
    socket.send(JSON.stringify(answer));
  });
});
