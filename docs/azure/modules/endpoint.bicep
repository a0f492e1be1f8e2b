// A private endpoint, with the names by which it is found.
param name string
param location string
param subnet string
param target string
param kind string
param zones array

resource endpoint 'Microsoft.Network/privateEndpoints@2024-01-01' = {
  name: name
  location: location
  properties: {
    subnet: { id: subnet }
    privateLinkServiceConnections: [
      {
        name: name
        properties: {
          privateLinkServiceId: target
          groupIds: [kind]
        }
      }
    ]
  }
}

resource dns 'Microsoft.Network/privateEndpoints/privateDnsZoneGroups@2024-01-01' = {
  parent: endpoint
  name: 'default'
  properties: {
    privateDnsZoneConfigs: [
      for (zone, i) in zones: {
        name: 'zone-${i}'
        properties: { privateDnsZoneId: zone }
      }
    ]
  }
}
